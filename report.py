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
    parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help="run folders")
    parser.add_argument("--run-dir", default="runs/cifar10", metavar="DIR",
                        help="the run folder, if none is named (default: %(default)s)")
    parser.add_argument("--out", default="runs/comparison", metavar="DIR",
                        help="where the table of several goes (default: %(default)s)")
    args = parser.parse_args(argv)
    from kd import record, report

    if len(args.runs) > 1:
        say(report.compare(args.runs, args.out))
    else:
        report.write(record.Experiment(*args.runs or [args.run_dir]))


if __name__ == "__main__":
    command(main)
