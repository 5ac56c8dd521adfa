"""Reports where the time of a run went, over all its starts.

python -m experiments.goodput_report --workdir=runs/digits
"""

from absl import flags

from diffusion.training.resilience import goodput
from experiments import cli

WORKDIR = cli.define_path("workdir", None, "Folder of the run.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    found = goodput.summary(WORKDIR.value)
    total = found["total"]
    rows = {**found["seconds"], "total": total, "lost": found["lost"]}
    for kind, seconds in rows.items():
        note = "  of step: repeated after a restart" if kind == "lost" else ""
        print(f"{kind:<10} {seconds:>14,.1f} s {100 * seconds / (total or 1):>6.1f} %{note}")
    starts = found["starts"]
    print(
        f"{starts} start{'s' if starts > 1 else ''}, last step {found['step']:,}, "
        f"{found['down']:,.1f} s of wall time between the starts"
    )
    print(f"goodput {found['goodput']:.4f}: the share of the total spent on steps that were not lost")


if __name__ == "__main__":
    cli.run(main)
