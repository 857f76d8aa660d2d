"""Split image folders, one per person, into train/ and val/, with no image in both subsets."""

from vavae_tools.data.split import CHECKS, LINKS, split_folders
from vavae_tools.runtime.errors import command_parser


def main() -> None:
    parser = command_parser("data_split.py", __doc__)
    add = parser.add_argument
    add("--input_dir", required=True, help="folder of person folders (ID_1, ID_2 …)")
    add("--output_dir", default="data_split", help="folder for train/, val/ and split_info.json")
    add("--train_ratio", type=float, default=0.8, help="share of each person's images to train on")
    add("--val_ratio", type=float, default=0.2, help="share of each person's images to validate on")
    add("--test_ratio", type=float, default=0.0, help="share kept in test/ for the evaluation alone, taken from both")
    add("--image_extensions", default="png,jpg,jpeg", help="what images end in, in small or capital letters")
    add("--seed", type=int, default=0, help="the same seed and files give the same split")
    add("--link", choices=LINKS, default="copy", help="copy the images, or link to them")
    add("--group_pattern", metavar="REGEX", help="its first group names the recording, which stays in one subset")
    add("--check", choices=CHECKS, default="decode", help="decode each image once, or compare file contents only")
    add("--overwrite", action="store_true", help="replace a different split in output_dir")
    add("--workers", type=int, help="threads; without it one per core, at most 8")
    args = vars(parser.parse_args())
    print(split_folders(extensions=args.pop("image_extensions"), progress=None, **args))
