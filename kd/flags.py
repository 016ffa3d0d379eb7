"""The command line: flags made from the fields of `Settings`; and the one in a config.json."""
import argparse
import difflib
import sys
from pathlib import Path

from kd import values
from kd.files import UserError, listed, one_field, read_sealed
from kd.settings import FIELDS, FLAGS, GROUPS, STAGES
from kd.values import is_own

# The stages whose settings are flags of each script; compile.py has all of them.
USES = {"TeacherTrain": ("teacher",), "distill": STAGES,
        **dict.fromkeys(("mms_threshold", "entropy", "transfer"), STAGES[:3])}
# What each of them makes, and may make again.
MAKES = {"TeacherTrain": ("teacher",), "mms_threshold": ("scores",), "entropy": ("scores",),
         "transfer": ("scores", "transfer"), "distill": ("students",)}
OF_TRAINING = ("amp", "compile", "tensorboard", "wandb")      # of the group that all stages share
MAKER = {stage: f"{script}.py" for script, stages in MAKES.items() for stage in stages}
# Settings that an older version had not, and what it did.
ADDED = {"optimizer": "sgd"}
NAME_CODE = ("approaches", "teacher_arch", "student_arch")
APPROACH = {"group": "everyday", "flag": dict(
    type=values.approach, metavar="A", default="mms",
    help="one of those of compile.py, or FILE.py, a criterion of your own (default: mms)")}
EXPORT = {"group": "everyday", "flag": dict(
    choices=("onnx", "state_dict", "safetensors"),
    help="also write the student in another form, beside its checkpoint")}
CONFIG = {"group": "running", "flag": dict(
    type=Path, metavar="FILE",
    help="a config.json whose flags hold where none is given, to repeat a run")}
# Flags of the scripts that are not settings, as the metadata of a field of Settings.
MORE = {"compile": {"config": CONFIG}, "transfer": {"approach": APPROACH},
        "distill": {"approach": APPROACH, "export": EXPORT}}


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


def add_flags(parser, names, more=None, shown=GROUPS):
    """Adds the flags of these settings, and those of `more` (as in MORE), to a parser, in their
    groups. shown: the groups that --help has."""
    flags = (more or {}) | {name: FIELDS[name].metadata for name in names}
    for group in GROUPS:
        inside = parser.add_argument_group(group)
        for name, flag in ((name, flags[name]["flag"]) for name in flags
                           if flags[name]["group"] == group):
            words = [flag_of(name), "--seed"] if name == "seeds" else [flag_of(name)]
            text = flag["help"] if group in shown else argparse.SUPPRESS
            inside.add_argument(*words, dest=name, **flag | {"help": text})


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def flags_of(script):
    """The names of the settings that are flags of a script."""
    if script not in USES:
        return FLAGS
    trains = {"teacher", "students"} & {*MAKES[script]}
    others = ("approaches", "restart", *(() if trains else OF_TRAINING))
    return tuple(name for name in FLAGS if name not in others and
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
    add_flags(parser, flags_of(script), MORE.get(script),
              GROUPS if "--help-all" in sys.argv else GROUPS[:1])
    return parser


def parse(argv, script, description):
    """{name: value} of what the command line gives, or the config.json that it names."""
    parser = parser_of(script, description)
    given = vars(parser.parse_args(argv))
    if script in USES and len(given.get("seeds", ())) > 1:
        parser.error("argument --seeds: a stage takes one (of several, each has a folder: "
                     "--run-dir DIR/seed-N)")
    again = given.get("restart_from")
    if again and again not in MAKES.get(script, STAGES):
        parser.error(f"argument --restart-from: that is for {MAKER[again]}, which makes {again}")
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs contradict each other: give one of them")
    return with_config(given["config"], given, script)[0] if "config" in given else given


def repeatable(settings, given):
    """Those of the flags given that repeat a run, wherever that is done."""
    of_this_run = ("run_dir", "restart", "restart_from")
    return {name: value for name, value in given.items()
            if name in FLAGS and name not in of_this_run} | {
                "data_dir": values.path(settings.data_dir), "seeds": settings.seeds}


def read_config(path):
    """The content of a config.json; "given": as `parse` returns it. Raises UserError where it is
    not what was written there."""
    config = read_sealed(path) or {}
    if "given" not in config:
        raise UserError(f"{path} is missing, damaged or of another version, so {path.parent} is "
                        "not a run folder. Running compile.py again writes it.")
    given = {name: value for name, value in ADDED.items() if name not in config}
    return config | {"given": given | {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["given"].items()}}


def code_in(given):
    """The flags, as words, of those given that name code."""
    texts = {name: ",".join(value) if isinstance(value, tuple) else value
             for name, value in given.items() if name in NAME_CODE}
    return [f"{flag_of(name)}={text}" for name, text in texts.items()
            if is_own(text) or any(each.endswith(".py") for each in text.split(","))]


def with_config(path, given, script):
    """(What is given, and what a config.json says of the script's flags where nothing is; the same
    of all flags.) Raises UserError where the first names code that is not given."""
    without = set(given)
    if without & {"steps", "epochs"}:       # of which a run has one
        without |= {"steps", "epochs"}
    stored = {name: value for name, value in read_config(path)["given"].items()
              if name not in without}
    used = {name: value for name, value in stored.items() if name in flags_of(script)}
    if code := code_in(used):
        raise UserError(f"{path} names code, and code runs only where the command line names it: "
                        f"add {listed(code)}.")
    return used | given, stored | given
