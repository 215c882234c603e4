"""The commands. A user's mistake ends in one message and exit 2, without a traceback."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.config import (
    READS,
    Resolved,
    called_elsewhere,
    flags,
    load_run,
    load_stages,
    values_from_flags,
)
from upweight.config.keys import candidates
from upweight.config.sections import SECTIONS
from upweight.errors import Refusal, UpweightError, nearest

if TYPE_CHECKING:
    from upweight.recipes.exported import Compared
    from upweight.recipes.screen import Screen


USAGES = {
    "train": "[RUN.yaml] [key=value ...]",
    "check": "[RUN.yaml] [key=value ...] [--json]",
    "score": "--model MODEL --data FILE --out FILE",
    "sample": "--model MODEL --prompts FILE --out FILE [-n NUM] [--top-p P]",
}
"""What each command needs, before the keys."""

COMPARED = "runs/compare"
"""Where a comparison is written to that names no folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 2 for a mistake or refusal, 130 when stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Rows hold letters that a terminal's encoding may lack.
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    takes_keys = words[:1] in (["train"], ["check"])
    words, overrides = _apart(words) if takes_keys else (words, [])
    try:
        arguments, unknown = parser.parse_known_args(words)
        if arguments.command is None and not unknown:
            parser.print_help()
            return 0
        if takes_keys:
            # argparse gives up on a file that stands behind flags.
            files = [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
            arguments.config = [*arguments.config, *files, *overrides]
        _refuse(unknown, arguments.command)
        return arguments.run(arguments)
    except UpweightError as error:
        code = f"[{error.code}]" if error.code else ""
        print(f"error{code}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def _refuse(unknown: Sequence[str], command: str | None) -> None:
    """Raises UpweightError for a word that no argument takes, with the nearest flag."""
    if not unknown:
        return
    word = unknown[0].partition("=")[0]
    if command == "compare" and "=" in unknown[0]:
        raise UpweightError(
            f"{unknown[0]} is no argument of upweight compare: write keys in the file, beside "
            "methods for all of them or inside of one. --model and --out are flags."
        )
    known = [n for flag in flags() if flag.key in READS.get(str(command), ()) for n in flag.names]
    where = f"upweight {command}" if command else "upweight"
    guess = called_elsewhere(word.removeprefix("--")) or nearest(word, known)
    if word in known:  # data.path, which sample calls by another name
        guess = " Here that is --prompts."
    raise UpweightError(
        f"{unknown[0]} is no argument of {where}.{guess} All of them: {where} --help"
    )


def _parser() -> argparse.ArgumentParser:
    from upweight import __version__

    parser = argparse.ArgumentParser(
        prog="upweight",
        description="Align language models with preferences by Direct Preference Optimization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"upweight {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser("train", help="train a model on preferences", allow_abbrev=False)
    _add_config(train, "train", overrides=True)
    train.set_defaults(run=_train)

    check = commands.add_parser(
        "check", help="everything that can be known before step 1", allow_abbrev=False
    )
    check.add_argument("--json", action="store_true", help="all of it for machines: docs/check.md")
    _add_config(check, "check", overrides=True)
    check.set_defaults(run=_check)

    score = commands.add_parser(
        "score", help="log-probs, implicit rewards and margins per preference", allow_abbrev=False
    )
    _add_overwrite(score)
    _add_config(score, "score", overrides=False)
    score.set_defaults(run=_score)

    sample = commands.add_parser("sample", help="answers to prompts", allow_abbrev=False)
    sample.add_argument(
        "--prompts",
        action="extend",
        nargs="+",
        required=True,
        dest="data.path",
        metavar="FILE",
        help="files with a prompt a row",
    )
    sample.add_argument(
        "-n", "--num", type=int, default=1, metavar="NUM", help="answers to each prompt (1)"
    )
    sample.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1.0: off)"
    )
    _add_overwrite(sample)
    _add_config(sample, "sample", overrides=False)
    sample.set_defaults(run=_sample)

    report = commands.add_parser("report", help="rebuild report.html of a run directory")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)

    explain = commands.add_parser(
        "explain", help="what a diagnosis code means and what to do; without one, the list"
    )
    explain.add_argument("code", nargs="?", metavar="CODE", help="such as UW101")
    explain.set_defaults(run=_explain)

    compare = commands.add_parser(
        "compare",
        help="SFT, DPO, reward model and PPO, GRPO from one start; without a file, on the demo",
        allow_abbrev=False,
    )
    compare.add_argument("config", nargs="?", type=Path, metavar="COMPARE.yaml")
    compare.add_argument("--model", help="the start (the demo's model)")
    compare.add_argument("--out", help=f"folder of the runs and the page (the file's, {COMPARED})")
    compare.set_defaults(run=_compare)

    demo = commands.add_parser("demo", help="the embedded default, start to report")
    demo.add_argument("--model", help="another model than the one that ships as a package")
    demo.add_argument("--out", help="run directory (runs/demo, or the next free one)")
    demo.set_defaults(run=_demo)
    return parser


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file of --out if it holds something"
    )


class _Help(argparse.HelpFormatter):
    """Each flag once, as it is written in full and as short as it may be; what it takes stands in
    its help. Not the same names again with - for _, which are understood too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        all_names = action.option_strings
        names = [
            n for n in all_names if "-" not in n[2:] or f"--{_underscored(n)}" not in all_names
        ]
        return f"{', '.join(names)} {action.metavar or ''}".strip()


class _Typed(argparse.Action):
    """Keeps words under their key, those of a list together, and the flag as it was typed, which
    errors name and which may be short of the key."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest) or [] if self.nargs == "+" else None
        setattr(namespace, self.dest, values if before is None else [*before, *values])
        typed = {self.dest: _underscored(option_string or self.dest)}
        namespace.typed = getattr(namespace, "typed", {}) | typed


def _underscored(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _add_config(parser: argparse.ArgumentParser, command: str, overrides: bool) -> None:
    """run.yaml, key=value overrides, and every key as a flag, section by section.

    A flag that the command does not read is not shown, and refused later with the commands that do.
    """
    parser.formatter_class = _Help
    parser.usage = f"%(prog)s {USAGES[command]} [--KEY VALUE ...]"
    if overrides:
        parser.add_argument(
            "config",
            nargs="*",
            metavar="RUN.yaml, key=value",
            help="a file of keys, and keys that change it; each is a flag too",
        )
    groups: dict[str, Any] = {}
    for flag in flags():
        if command == "sample" and flag.key == "data.path":
            continue  # called --prompts there
        shown = flag.key in READS[command]
        if flag.section not in groups and shown:
            about = SECTIONS[flag.section].__doc__ if flag.section else "what is done to what"
            groups[flag.section] = parser.add_argument_group(flag.section or "run", about)
        about = f"{flag.description} ({flag.type}; default: {flag.default})".replace("%", "%%")
        names = list(flag.names)
        names += [n.replace("_", "-") for n in names if "_" in n]
        groups.get(flag.section, parser).add_argument(
            *names,
            action=_Typed,
            dest=flag.key,
            default=None,
            nargs="+" if flag.many else "?" if flag.switch else None,
            const="true" if flag.switch else None,
            metavar="VALUE ..." if flag.many else "[VALUE]" if flag.switch else "VALUE",
            help=about if shown else argparse.SUPPRESS,
        )


def _stages(arguments: argparse.Namespace, required: tuple[str, ...] = ()) -> list[Resolved]:
    """What train or check is asked for, looked at: a run, or the stages of a file that has some."""
    from upweight.recipes.look import look

    stages = _resolve(arguments, required)
    look(arguments.command, stages)
    return stages


def _resolve(arguments: argparse.Namespace, required: tuple[str, ...] = ()) -> list[Resolved]:
    said: list[str] = getattr(arguments, "config", [])
    files = [word for word in said if _is_file(word)]
    # A value that stands behind its key looks like a file, which is not there.
    behind = any(not os.path.exists(file) for file in files)
    apart = [word for word in said if word.startswith("=") or (behind and word.endswith("="))]
    if apart:
        raise UpweightError(f'"{apart[0]}" stands alone; write key=value without spaces.')
    if len(files) > 1:
        raise UpweightError(f"one RUN.yaml at a time; found: {', '.join(files)}")
    known = {flag.key for flag in flags()}
    typed: dict[str, str] = getattr(arguments, "typed", {})
    texts = {typed.get(key, key): value for key, value in vars(arguments).items() if key in known}
    return load_stages(
        files[0] if files else None,
        [word for word in said if not _is_file(word)],
        values_from_flags(texts),
        origin_of_values="flag",
        required=required,
    )


def _is_file(word: str) -> bool:
    """Whether a word is RUN.yaml and not key=value: a folder's name may hold an equals sign."""
    return "=" not in word or "/" in word.partition("=")[0] or os.path.isfile(word)


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without its key=value words, and these, in their order: a list or a switch
    that they stand behind would take them."""
    takes_one = {
        f"--{name}"
        for flag in flags()
        if not flag.many and not flag.switch
        for n in flag.names
        for name in (n.removeprefix("--"), n.removeprefix("--").replace("_", "-"))
    }
    others: list[str] = []
    overrides: list[str] = []
    for before, word in itertools.pairwise(["", *words]):
        changes = before not in takes_one and _is_override(word)
        (overrides if changes else others).append(word)
    return others, overrides


def _is_override(word: str) -> bool:
    """Whether a word is key=value, with the name of a key here or elsewhere, or with one that is
    no part of a data file's name."""
    name = word.partition("=")[0]
    if _is_file(word) or re.fullmatch(r"[A-Za-z][\w.-]*", name) is None:
        return False
    if candidates(name) or called_elsewhere(name) or name.partition(".")[0] in SECTIONS:
        return True
    from upweight.data.read import is_data_file

    return not is_data_file(word)


def _train(arguments: argparse.Namespace) -> int:
    stages = _stages(arguments, required=("out",))
    from upweight.recipes.stages import train_stages
    from upweight.terminal import default_screen

    with default_screen() as screen:
        result = train_stages(stages, screen)
    return 0 if result.finished else 130


def _check(arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _check_as_json(arguments)
    if _is_model_alone(arguments):
        from upweight.terminal import default_screen

        with default_screen(stderr=False) as screen:
            _check_model(arguments, screen)
        return 0
    stages = _stages(arguments)
    from upweight.recipes.stages import check_stages
    from upweight.terminal import default_screen

    with default_screen(stderr=False) as screen:
        check_stages(stages, screen)
    return 0


def _is_model_alone(arguments: argparse.Namespace) -> bool:
    given = {key for key, value in vars(arguments).items() if value is not None}
    return not arguments.config and "model" in given and "data.path" not in given


def _check_model(arguments: argparse.Namespace, screen: Screen | None = None) -> Compared:
    """Without data there is a model to check, against the probes that travelled with it."""
    known = {flag.key for flag in flags()}
    texts = {key: value for key, value in vars(arguments).items() if key in known}
    for key, value in texts.items():
        if value is not None and key != "model" and not key.startswith("compute."):
            raise UpweightError(
                f"--{key} has no effect without data: then check compares --model with the "
                "probes.json that it was exported with. Give --data, or leave it out."
            )
    from upweight.recipes.check import check_model

    values = {**values_from_flags(texts), "data.path": "probes.json"}
    return check_model(load_run(None, values=values, origin_of_values="flag").run, screen)


def _check_as_json(arguments: argparse.Namespace) -> int:
    """What was found on standard output, of a model how far it is from its probes, or
    {"error": {"code", "message"}} and status 2, beside what was found until then."""
    try:
        if _is_model_alone(arguments):
            found = _check_model(arguments)
            record: dict[str, object] = {
                "probes": found.num_probes,
                "largest_difference": found.worst,
                "allowed": found.allowed,
                "doubt": found.doubt,
            }
        else:
            stages = _stages(arguments)
            from upweight.recipes.stages import check_stages

            record = check_stages(stages).to_json()
        print(json.dumps(record, ensure_ascii=False, indent=1))
    except UpweightError as error:
        found = error.found if isinstance(error, Refusal) else {}
        record = {"error": {"code": error.code, "message": str(error)}, **found}
        print(json.dumps(record, ensure_ascii=False, indent=1))
        return 2
    return 0


def _score(arguments: argparse.Namespace) -> int:
    (resolved,) = _resolve(arguments, required=("out",))
    from upweight.recipes.score import score_file
    from upweight.terminal import default_screen

    with default_screen() as screen:
        score_file(resolved.run, screen, overwrite=arguments.overwrite)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    (resolved,) = _resolve(arguments, required=("out",))
    from upweight.recipes.score import sample_file
    from upweight.terminal import default_screen

    with default_screen() as screen:
        sample_file(
            resolved.run,
            num=arguments.num,
            top_p=arguments.top_p,
            screen=screen,
            overwrite=arguments.overwrite,
        )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from upweight.recipes.train import rebuild_report

    print(rebuild_report(arguments.folder))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from upweight.trust.codes import FAMILIES, as_text, list_as_text, page

    console = Console(highlight=False)
    if arguments.code is None:
        written = list_as_text(FAMILIES)
    else:
        written = as_text(page(arguments.code), width=min(console.width, 88))
    text = Text(written)
    text.highlight_regex(r"(?m)^\S.*$", "bold")
    console.print(text, soft_wrap=True)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from upweight.config.methods import load_comparison
    from upweight.demo.run import demo_comparison
    from upweight.recipes.compare import compare
    from upweight.terminal import default_screen

    given = {} if arguments.model is None else {"model": arguments.model}
    with default_screen() as screen:
        if arguments.config is not None:
            comparison = load_comparison(arguments.config, given)
            done = compare(comparison, arguments.out or comparison.out or COMPARED, screen)
        else:
            with demo_comparison(arguments.model) as comparison:
                done = compare(comparison, arguments.out or COMPARED, screen)
    if done.page is None:
        return 130
    return 2 if done.failed else 0


def _demo(arguments: argparse.Namespace) -> int:
    from upweight.demo.run import demo, free_folder
    from upweight.terminal import default_screen, show_outcome

    with default_screen() as screen:
        outcome = demo(arguments.model, arguments.out or free_folder("runs/demo"), screen)
    if outcome is None:
        return 130
    show_outcome(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
