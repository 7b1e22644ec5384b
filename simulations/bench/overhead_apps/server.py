"""A ServerApp that sends every node one task per round, and writes down the CPU time that the sites have used."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from panfm.config import dump_toml, load_run
from panfm.outputs import append_json_line
from panfm.sharing.messages import RoundTask
from server.checkpoint import ServerState
from server.exchange import Exchange
from server.rounds import initial_state
from strategies.round_messages import make_array

_TIMEOUT_S = 300.0
_FIELDS = {"session": 3, "utime": 11, "stime": 12, "cutime": 13, "cstime": 14}
"""Of /proc/<pid>/stat, counted from the one after the name."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`run-dir` holds run.toml and sessions.json; cpu.jsonl is written."""
    folder = Path(str(context.run_config["run-dir"]))
    run = load_run(folder / "run.toml")
    sessions = set(json.loads((folder / "sessions.json").read_text()))
    state, _ = initial_state(run)
    for number in range(1, run.train.rounds + 1):
        content = _task(dump_toml(run), state, number)
        nodes = grid.get_node_ids()
        messages = [Message(content, node_id, MessageType.TRAIN, ttl=_TIMEOUT_S) for node_id in nodes]
        exchange = Exchange(grid, messages, _TIMEOUT_S)
        line = {
            "messages": len(list(exchange)),
            "ticks": cpu_ticks(sessions),
            "failed": list(exchange.failed.values()),
        }
        append_json_line(folder / "cpu.jsonl", line)


def cpu_ticks(sessions: set[int]) -> int:
    """Clock ticks of CPU, user and system, that all processes of some sessions have used so far, those that ended
    included.

    A process that ends while we look may be missed, never counted twice, so the most of three looks is right.
    """
    return max(sum(map(_ticks, _members(sessions))) for _ in range(3))


def _members(sessions: set[int]) -> list[list[str]]:
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[_FIELDS["session"]]) in sessions:
            members.append(fields)
    return members


def _ticks(fields: list[str]) -> int:
    return sum(int(fields[_FIELDS[name]]) for name in ("utime", "stime", "cutime", "cstime"))


def _task(run_toml: str, state: ServerState, number: int) -> RecordDict:
    records = RoundTask(state.run_id, number, run_toml, state.groups).to_records()
    arrays = ArrayRecord({name: make_array(flat) for name, flat in records.arrays.items()})
    return RecordDict({"arrays": arrays, "config": ConfigRecord(dict(records.config))})
