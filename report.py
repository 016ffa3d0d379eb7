"""The table, the figures and the page of a run, finished or not; or the table of several runs.

In:  run folders.
Out: results.json, results.md, figures/*.png and report.html in the run folder; of several, table.md
     and table.csv.

    python report.py --run-dir runs/cifar10
    python report.py runs/a runs/b --out runs/comparison
"""
from kd.command import command
from kd.files import say
from kd.flags import bare_parser


def main(argv):
    parser = bare_parser("report", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", default=[], help="run folders")
    for flag, default, what in (("--run-dir", "runs/cifar10", "the run folder, if none is named"),
                                ("--out", "runs/comparison", "where the table of several goes")):
        parser.add_argument(flag, default=default, metavar="DIR",
                            help=f"{what} (default: {default})")
    args = parser.parse_args(argv)
    from kd import record, report

    if len(args.runs) > 1:
        return say(report.compare(args.runs, args.out))
    experiment = record.Experiment(*args.runs or [args.run_dir])
    say(report.write(experiment))
    say(report.illustrate(experiment))


if __name__ == "__main__":
    command(main)
