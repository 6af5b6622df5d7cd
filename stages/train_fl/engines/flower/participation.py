"""Which clients took part: participation.csv, one row per round and sampled client.

round, client, name, outcome ("trained", or why not), num_samples, train_seconds (on the node)
"""

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.federation.members import Member
from pipeline.io import atomic
from stages.train_fl.engines.flower.messages import TrainReply

log = logging.getLogger(__name__)

_TRAINED = "trained"


class _Record:
    """How often a client was sampled and trained, and why it did not in other rounds."""

    def __init__(self) -> None:
        self.name, self.rounds, self.missed = "", 0, list[str]()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of the table."""
        self.name = row["name"]
        self.rounds += 1
        if row["outcome"] != _TRAINED:
            self.missed.append(f"round {row['round']}: {row['outcome']}")


class Participation:
    """The table in the run's folder, to which every round is appended."""

    def __init__(self, folder: Path, rounds_done: int) -> None:
        """Continue the table in `folder` from the rounds done before; later rows are dropped."""
        self._file = folder / "participation.csv"
        self._clients: dict[int, _Record] = {}
        self._latest: list[dict[str, Any]] = []  # the rows of the round that was added last
        kept = [row for row in _read(self._file) if int(row["round"]) <= rounds_done]
        self._file.unlink(missing_ok=True)
        if kept:
            atomic.write_csv(self._file, kept, sync=False)
        self._count(kept)

    def add(self, number: int, replies: dict[Member, TrainReply], failures: dict[Member, str]) -> None:
        """Append a round to the table. Clients that failed are logged by name."""
        self._latest = []
        for member in sorted([*replies, *failures], key=lambda member: member.client_id):
            reply = replies.get(member)
            if not reply:
                log.warning("round %d continues without %s: %s", number, member, failures[member])
            row: dict[str, Any] = {"round": number, "client": member.client_id, "name": member.name}
            row["outcome"] = _TRAINED if reply else failures[member]
            row["num_samples"] = reply.update.num_samples if reply else 0
            row["train_seconds"] = reply.train_seconds if reply else None
            self._latest.append(row)
        if self._latest:  # nobody if all left after the requests were addressed
            atomic.append_csv(self._file, self._latest)
        self._count(self._latest)

    def outcomes(self) -> str:
        """Return the outcomes of the round that was added last, on one line."""
        return "; ".join(f"client {row['client']}: {row['outcome']}" for row in self._latest)

    def summary(self) -> str:
        """Return one line per client: the number of rounds in which it trained, and why it did not in others."""
        lines = []
        for client, record in sorted(self._clients.items()):
            trained = record.rounds - len(record.missed)
            line = f"client {client} ({record.name}): trained in {trained} of {record.rounds} rounds"
            lines.append("; ".join([line, *record.missed]))
        return "\n".join(lines)

    def _count(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._clients.setdefault(int(row["client"]), _Record()).add(row)


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a table, without the last one if a process was killed while it wrote it."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            complete, newline, _ = stream.read().rpartition("\n")
    except FileNotFoundError:
        return []
    return list(csv.DictReader(io.StringIO(complete + newline, newline="")))
