"""A script for SLURM's sbatch."""

import math
import shlex

from jobs.job import Job
from jobs.render.file import Arguments, head, seconds, takes_of
from pipeline.errors import UserError

PLAIN_PORT = 6379


def render(job: Job, arguments: Arguments) -> str:
    """A script for sbatch. SLURM has no schedules of its own: scrontab, or cron, submits it."""
    takes = takes_of([*map(job.of, job.cells), *job.after])
    (fewest, most), *others = sorted({job.group(cell) for cell in job.cells})
    if others:
        raise UserError(
            f"{job.path}: its cells ask for different numbers of workers, and all tasks of a SLURM array get as many "
            "nodes; render it once for each, with --set workers=…"
        )
    cpus = math.ceil(takes.cpus) or 1
    options = [
        f"job-name=ssl-{job.name}",
        f"nodes={fewest}" if fewest == most else f"nodes={fewest}-{most}",
        "ntasks-per-node=1",
        f"cpus-per-task={cpus}",
        "exclusive",
    ]
    options += [f"gpus-per-node={math.ceil(takes.gpus)}"] if takes.gpus else []
    options += [f"mem={math.ceil(takes.memory / (1 << 20))}M"] if takes.memory else []
    limit = seconds(job)
    options += [f"time={math.ceil(limit / 60) + 10}"] if limit else []
    options += [f"array=0-{len(job.cells) - 1}"] if len(job.cells) > 1 else []
    options += ["output=%x-%j.log", "open-mode=append"]
    cells = " ".join(shlex.quote(cell.name) for cell in job.cells)
    words = [*map(shlex.quote, ["-m", "jobs.run", str(job.path)]), "--firing", '"$FIRING"', "--in-place"]
    words += ["--cell", '"${CELLS[${SLURM_ARRAY_TASK_ID:-0}]}"'] if len(job.cells) > 1 else []
    settings = ["--set", *map(shlex.quote, job.settings)] if job.settings else []
    words += settings
    plain = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items())
    needed = "".join(f': "${{{name}:?is not set; export it before sbatch}}"\n' for name in job.secrets)
    return (
        "#!/usr/bin/env bash\n"
        + "".join(f"#SBATCH --{option}\n" for option in options)
        + head(job)
        + ("# By its schedule: scrontab, with the cron line above.\n" if job.timetable else "")
        + ("# time: its limit for the job and for each step after it, and 10 minutes.\n" if limit and job.after else "")
        + "# Exclusive: symmetric-run begins no second Ray on a machine, and ends all that is there (`ray stop`).\n"
        + f"""set -euo pipefail
cd {shlex.quote(arguments.folder)}
{plain}{needed}CELLS=({cells})
PORT=$(({PLAIN_PORT} + ${{SLURM_JOB_ID:-0}} % 1000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
# One firing to a submission: that of its first task, for all of them, and after a requeue.
if [ -z "${{FIRING:-}}" ]; then
    ID=.firings/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}} OWN=.firings/$SLURM_JOB_ID.own
    mkdir -p .firings
    if [ ! -e "$ID" ]; then
        python -m jobs.firing {" ".join([shlex.quote(str(job.path)), *settings])} >"$OWN"
        ln "$OWN" "$ID" 2>/dev/null || true
        rm "$OWN"
    fi
    FIRING=$(cat "$ID")
fi
BEGAN=$(mktemp -u)
srun --export=ALL ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus {cpus} -- \\
    bash -c 'touch "$0"; exec "$@"' "$BEGAN" python {" ".join(words)}
# symmetric-run ends with 0 where Ray does not start.
rm "$BEGAN" 2>/dev/null || {{ echo "nothing ran: Ray did not start, for the reason above" >&2; exit 1; }}
"""
    )
