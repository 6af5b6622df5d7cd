"""Which clients took part: participation.csv, one row per round and sampled client.

round, client, name, outcome ("trained", or why not), num_samples, train_seconds (on the node)
"""

import csv
import logging
from pathlib import Path
from typing import Any

from pipeline.federation.members import Member
from pipeline.io import atomic
from stages.train_fl.engines.flower.messages import TrainReply

log = logging.getLogger(__name__)


class Participation:
    """The rows so far, written to the run's folder after every round."""

    def __init__(self, folder: Path, rounds_done: int) -> None:
        """Continue the table in `folder` from the rounds done before; later rows are dropped."""
        self._file = folder / "participation.csv"
        self._rows = [row for row in _read(self._file) if int(row["round"]) <= rounds_done]

    def add(self, number: int, replies: dict[Member, TrainReply], failures: dict[Member, str]) -> None:
        """Add a round and write the table. Clients that failed are logged by name."""
        for member in sorted([*replies, *failures], key=lambda member: member.client_id):
            reply = replies.get(member)
            if not reply:
                log.warning("round %d continues without %s: %s", number, member, failures[member])
            row: dict[str, Any] = {"round": number, "client": member.client_id, "name": member.name}
            row["outcome"] = "trained" if reply else failures[member]
            row["num_samples"] = reply.update.num_samples if reply else 0
            row["train_seconds"] = reply.train_seconds if reply else None
            self._rows.append(row)
        atomic.write_csv(self._file, self._rows, sync=False)

    def outcomes(self, number: int) -> str:
        """Return the outcomes of a round, on one line."""
        return "; ".join(f"client {row['client']}: {row['outcome']}" for row in self._rows if row["round"] == number)

    def summary(self) -> str:
        """Return one line per client: the number of rounds in which it trained, and why it did not in others."""
        lines = []
        for client in sorted({int(row["client"]) for row in self._rows}):
            own = [row for row in self._rows if int(row["client"]) == client]
            missed = [f"round {row['round']}: {row['outcome']}" for row in own if row["outcome"] != "trained"]
            line = f"client {client} ({own[-1]['name']}): trained in {len(own) - len(missed)} of {len(own)} rounds"
            lines.append("; ".join([line, *missed]))
        return "\n".join(lines)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError:
        return []
