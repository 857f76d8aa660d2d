"""Keep the generated images that are worth training on: the right person, plausible, no copies, varied."""

import shlex

from vavae_tools.runtime.errors import command_parser, run_command


def main() -> None:
    parser = command_parser("python -m vavae_tools.select", __doc__)
    add = parser.add_argument
    add("--generated_dir", required=True, help="folder of person folders (ID_1, ID_2 …) of generated images")
    add("--data_dir", required=True, help="real images: a split, a folder per class, a Hugging Face dataset")
    add("--output_dir", default="outputs/selected", help="gets a folder per person, and selection.json")
    add("--images_per_person", type=int, help="at most; without it all that may be kept")
    add("--image_size", type=int, help="pixels, to which all are resized; without it the generated images' own")
    add("--classifier_dir", default="outputs/evaluation", help="where the evaluation keeps its classifier")
    add("--seed", type=int, default=0, help="of the classifier")
    options = parser.parse_args()

    from vavae_tools.evaluation.selection import select_images

    print(select_images(**vars(options)))
    paths = f"--generated_dir {shlex.quote(options.output_dir)} --data_dir {shlex.quote(options.data_dir)}"
    print(f"next: python -m vavae_tools.evaluate {paths} --gain")


if __name__ == "__main__":
    run_command(main)
