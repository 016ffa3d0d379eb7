"""The command line: flags made from the fields of `Settings`; and the one in a config.json."""
import argparse
import difflib
import json
import sys
from pathlib import Path

from kd import values
from kd.files import UserError, listed, one_field, read_sealed
from kd.recipes import RECIPES
from kd.settings import FIELDS, FLAGS, GROUPS, STAGES
from kd.values import is_own

# The stages whose settings are flags of each script; compile.py has all of them.
USES = {"TeacherTrain": ("teacher",), "distill": STAGES,
        **dict.fromkeys(("mms_threshold", "entropy", "transfer"), STAGES[:3])}
# What each of them makes, and may make again.
MAKES = {"TeacherTrain": ("teacher",), "mms_threshold": ("scores",), "entropy": ("scores",),
         "transfer": ("scores", "transfer"), "distill": ("students",)}
MAKER = {stage: f"{script}.py" for script, stages in MAKES.items() for stage in stages}


APPROACH = "everyday", dict(
    type=values.approach, metavar="A", default="mms",
    help="one of those of compile.py, or FILE.py, a criterion of your own (default: mms)")
# Flags that are not settings, {script: {flag: (its group, keywords of argparse)}}.
MORE = {
    "compile": {"config": ("running", dict(type=Path, metavar="FILE", help="a config.json whose "
                "flags hold where the command line says nothing else, to repeat a run"))},
    "transfer": {"approach": APPROACH},
    "distill": {"approach": APPROACH, "export": ("everyday", dict(
        choices=("onnx", "state_dict", "safetensors"),
        help="also write the student in another form, beside its checkpoint"))},
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, status 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message):
        _, unknown, words = message.partition("unrecognized arguments: ")
        word = words.split(" ")[0].partition("=")[0]
        meant = [f"--target {word}"] if word[:1] != "-" else (
            difflib.get_close_matches(word, self._option_string_actions, 1, 0.7))
        hint = f". Did you mean {meant[0]}?" if unknown and meant else ""
        self.exit(2, f"{self.prog}: {one_field(message)}{hint} (see --help)\n")


def add_flags(parser, names, more=(), shown=GROUPS):
    """Adds the flags of these settings, and those of `more` (as in MORE), to a parser, in their
    groups. shown: the groups that --help has."""
    for group in GROUPS:
        of_group = {name: more[name][1] for name in more if more[name][0] == group}
        of_group |= {name: FIELDS[name].metadata["flag"] for name in FLAGS if name in names
                     and FIELDS[name].metadata["group"] == group}
        inside = parser.add_argument_group(group) if of_group else None
        for name, flag in of_group.items():
            words = [flag_of(name), *(["--seed"] if name == "seeds" else [])]
            default = "the recipe's" if name in RECIPES["reference"] else (
                FIELDS[name].default if name in FIELDS else None)
            text = flag["help"] + (f" (default: {default})" if default and (
                "(default" not in flag["help"]) else "")
            text = text if group in shown else argparse.SUPPRESS
            inside.add_argument(*words, dest=name, **flag | {"help": text})


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def flags_of(script):
    """The names of the settings that are flags of a script."""
    if script not in USES:
        return FLAGS
    return tuple(name for name in FLAGS if name not in ("approaches", "restart") and
                 FIELDS[name].metadata["stage"] in (None, *USES[script]))


def bare_parser(script, description):
    """A parser without flags; description: the script's docstring, with its examples."""
    summary, _, rest = description.strip().partition("\n")
    commands = [line for line in rest.splitlines() if line.startswith("    python")]
    return Parser(prog=f"{script}.py", description=summary,
                  epilog="\n".join(["examples:", *commands]),
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def parser_of(script, description):
    """The parser of a script's command line; description: its docstring."""
    parser = bare_parser(script, description)
    parser.add_argument("--help-all", action="help", help="show every flag and exit")
    add_flags(parser, flags_of(script), MORE.get(script, {}),
              GROUPS if "--help-all" in sys.argv else GROUPS[:1])
    return parser


def parse(argv, script, description, stored=None):
    """{name: value} of what the command line gives. stored: words that stand before it, so that it
    has the last word."""
    parser = parser_of(script, description)
    given = vars(parser.parse_args([*(stored or ()), *argv]))
    if script in USES and len(given.get("seeds", ())) > 1:
        parser.error("argument --seeds: a stage takes one (of several, each has a folder: "
                     "--run-dir DIR/seed-N)")
    again = given.get("restart_from")
    if again and again not in MAKES.get(script, STAGES):
        parser.error(f"argument --restart-from: that is for {MAKER[again]}, which makes {again}")
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs contradict each other: give one of them")
    if "config" in given and stored is None:
        return parse(argv, script, description, stored_words(given["config"], given, script))
    return given


def words_of(settings, given):
    """The command line, [--flag=value], that stands for what was given, wherever it is run."""
    words, always = [], {"data_dir": values.path(settings.data_dir), "seeds": settings.seeds}
    for name, value in (given | always).items():
        if name not in FLAGS or name in ("run_dir", "restart", "restart_from"):
            continue
        if FIELDS[name].metadata["flag"].get("action"):
            words.append(flag_of(name if value else f"no_{name}"))
        elif name == "classes" and isinstance(value, tuple):
            words.append(f"--classes={json.dumps(value)}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"{flag_of(name)}={text}")
    return words


def read_config(path):
    """The content of a config.json. Raises UserError where it is not what was written there."""
    config = read_sealed(path) or {}
    if "command" not in config:
        raise UserError(f"{path} is missing or damaged, so {path.parent} is not a run folder. "
                        "compile.py writes it.")
    return config


def stored_words(path, given, script):
    """The words of a config.json that are flags here, less those whose flag (of --steps and
    --epochs either) is given. Raises UserError where they name code that `given` does not."""
    replaced = {flag_of(name) for name in given}
    if {"--steps", "--epochs"} & replaced:
        replaced |= {"--steps", "--epochs"}
    known = {flag_of(name) for name in flags_of(script)} - replaced
    known |= {flag.replace("--", "--no-", 1) for flag in known}     # of a switch
    words = [word for word in read_config(path)["command"] if word.partition("=")[0] in known]
    code = [word for word in words if is_own(word.partition("=")[2]) or any(
        each.strip().endswith(".py") for each in word.split(","))]
    if code:
        raise UserError(f"{path} names code, and code runs only where the command line names it: "
                        f"add {listed(code)}.")
    return words
