"""Write pages/options.md, every option of every experiment, from the recipes: python docs/options.py"""

from collections import defaultdict
from pathlib import Path
from typing import Literal, get_args, get_origin

from vavae_tools.recipes.config import _as_typed, _settings_of_experiment, experiments

PAGE = Path(__file__).parent / "pages/options.md"
HEAD = """# Every option

Made from the recipes by `python docs/options.py`. On a command line an option is `SECTION.NAME=VALUE`, or
`--NAME VALUE` where the name is unique; `experiment=NAME --help` shows one experiment's, `--print_config` what a run
would use. `null` means: what suits the data and the machine.

| experiment | what it trains |
|---|---|
"""


def page() -> str:
    names = experiments()
    found: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name in names:
        keys = _settings_of_experiment(name)
        for key, setting in keys.settings.items():
            choices = [str(each) for kind in setting.kinds if get_origin(kind) is Literal for each in get_args(kind)]
            meaning = (f"{', '.join(choices)}: " if len(choices) > 1 else "") + setting.metadata["help"]
            found[key.rpartition(".")[0]][f"`{key}` | {meaning}"][_as_typed(keys.values[key])].append(name)
    lines = [f"| `{name}` | {what} |" for name, what in names.items()]
    for section, rows in found.items():
        lines += ["", f"## {section or 'Of the run'}", "", "| option | meaning | default |", "|---|---|---|"]
        lines += [f"| {row} | {_defaults(by_value, len(names))} |" for row, by_value in rows.items()]
    return HEAD + "\n".join(lines) + "\n"


def _defaults(by_value: dict[str, list[str]], all_of_them: int) -> str:
    """Return the defaults, and whose they are where not every experiment has the same."""
    if len(by_value) == 1 and len(next(iter(by_value.values()))) == all_of_them:
        return f"`{next(iter(by_value))}`"
    return "; ".join(f"`{value}` ({', '.join(names)})" for value, names in by_value.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
