"""The log of verdicts on disk: a SQLite file that only grows, and that a crash cannot take a verdict from.

One process writes, several may read. Every call that returns has its verdicts on disk: the journal is a write-ahead
log with ``synchronous=FULL``, so a commit waits for the disk. ``NORMAL`` would also outlive a killed process, but not a
power cut; a verdict costs a person seconds and the wait milliseconds.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ial_nap.annotations import Annotation, Disagreement, context_hash, disagreements, feature_set_hash
from shared_core.errors import InputError, UnknownKeyError

__all__ = ["AnnotationStore", "Effort", "Round"]

_APPLICATION = 0x6E61702D  # "nap-"
_VERSION = 1
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE log (id INTEGER PRIMARY KEY, time REAL NOT NULL, action TEXT NOT NULL, instance TEXT NOT NULL,"
    " step INTEGER NOT NULL, feature TEXT NOT NULL, verdict INTEGER NOT NULL, seconds REAL NOT NULL,"
    " annotator TEXT NOT NULL, round INTEGER NOT NULL, model TEXT NOT NULL, note TEXT NOT NULL, undo INTEGER NOT NULL)",
    "CREATE TABLE actions (annotator TEXT NOT NULL, action TEXT NOT NULL, PRIMARY KEY (annotator, action))"
    " WITHOUT ROWID",
    "CREATE TABLE rounds (time REAL NOT NULL, annotator TEXT NOT NULL, number INTEGER NOT NULL, model TEXT NOT NULL,"
    " metric TEXT NOT NULL, better TEXT NOT NULL, before REAL, value REAL, low REAL, high REAL,"
    " verdicts INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (annotator, number)) WITHOUT ROWID",
    "CREATE TABLE queues (annotator TEXT NOT NULL, round INTEGER NOT NULL, items TEXT NOT NULL,"
    " PRIMARY KEY (annotator, round)) WITHOUT ROWID",
    *(
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'the log only grows'); END"
        for table in ("log", "actions", "rounds", "queues")
        for verb in ("UPDATE", "DELETE")
    ),
)


@dataclass(frozen=True)
class Round:
    """One closed round of one annotator, and what it did to the score on held-out data.

    Parameters
    ----------
    annotator : who closed it
    number : counted from 1, for every annotator
    model : hash of the context at its end
    metric, better : of the score; ``higher`` or ``lower`` is better
    before, value, low, high : the score at the start and at the end of the round, and the end's interval; not a number
        where unknown
    verdicts, seconds : that stood at the end, and what they took
    """

    annotator: str
    number: int
    model: str
    metric: str
    better: str
    before: float
    value: float
    low: float
    high: float
    verdicts: int = 0
    seconds: float = 0.0

    @property
    def worse(self) -> bool:
        """Whether the score got worse."""
        return self.value < self.before if self.better == "higher" else self.value > self.before


@dataclass(frozen=True)
class Effort:
    """What one annotator has put in.

    Parameters
    ----------
    annotator : who
    verdicts : that stand
    instances : with a standing verdict
    seconds : of work, undone or not
    """

    annotator: str
    verdicts: int
    instances: int
    seconds: float


class AnnotationStore:
    """Verdicts of several annotators in one file.

    What one call to `add` brings is one action: `undo` takes the last action of an annotator back as a whole. Nothing
    is ever deleted; taking back is one more line of the log.

    Parameters
    ----------
    path : of the file; made where there is none
    features : names in the model's order
    steps : time steps T
    units : one per feature, or none
    read_only : open a file that another process may be writing to

    Raises
    ------
    InputError
        For a file that is no store, is damaged, is of a newer version, is about other features, or is being written by
        another process.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = AnnotationStore(Path(folder.name) / "verdicts.db", ["LDL", "HDL"], 4)
    >>> _ = store.add([Annotation("pid-17", 2, "LDL", 1, annotator="a")])
    >>> _ = store.add([Annotation("pid-17", 2, "LDL", 0, annotator="a")])
    >>> _ = store.undo("a")
    >>> [one.verdict for one in store.standing()]
    [1]
    >>> store.close(); folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        features: Sequence[str],
        steps: int,
        *,
        units: Sequence[str] = (),
        read_only: bool = False,
    ) -> None:
        self.path, self.features, self.steps = Path(path), tuple(features), steps
        self.units = tuple(units) or ("",) * len(features)
        self.read_only = read_only
        self._columns = frozenset(features)
        self._described = list(zip(self.features, self.units, strict=False))
        self._hash = feature_set_hash(features, steps, units)
        self._lock = threading.RLock()
        self._writer: sqlite3.Connection | None = None
        self._piles: dict[tuple[str, int, str, str], list[tuple[int, str, Annotation]]] = {}
        self._instances: dict[str, set[tuple[str, int, str, str]]] = {}
        self._actions: dict[str, list[tuple[str, list[tuple[str, int, str, str]]]]] = {}
        self._known: set[tuple[str, str]] = set()
        self._efforts: dict[str, float] = {}
        self._open: dict[str, int] = {}
        self._version = 0
        if read_only and not self.path.is_file():
            raise InputError(f"{path}: there is no such file to read")
        try:
            if not read_only:
                self._writer = self._only_writer()
            self._file = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
            try:
                self._prepare()
                self._replay()
            except BaseException:
                self._file.close()
                raise
        except BaseException as error:
            if self._writer is not None:
                self._writer.close()
            if isinstance(error, sqlite3.Error):
                raise InputError(
                    f"{path}: cannot be used as a store of verdicts ({error}); give another file"
                ) from None
            raise

    @staticmethod
    def about(path: str | Path) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
        """Return the names of the features, the number of steps and the units that a store was made for.

        Parameters
        ----------
        path : of the file

        Raises
        ------
        InputError
            For a file that is not there, or is no store.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such file to read")
        try:
            with closing(sqlite3.connect(path)) as file:
                (text,) = file.execute("SELECT value FROM meta WHERE key = 'described'").fetchone()
                found = json.loads(text)
        except (sqlite3.Error, TypeError, ValueError, RecursionError):
            raise InputError(f"{path}: is no store of verdicts; give another file") from None
        return tuple(found["features"]), int(found["steps"]), tuple(found["units"])

    def _only_writer(self) -> sqlite3.Connection:
        """Hold a lock that the operating system lets go of when the process ends, however it ends."""
        name = self.path.with_name(self.path.name + ".lock")
        try:
            lock = sqlite3.connect(name, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError:
            raise InputError(f"{self.path}: cannot be written to; give a file in a folder that exists") from None
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            if "locked" in str(error):
                raise InputError(
                    f"{self.path}: another process is writing to it; end that one, or open the file to read only"
                ) from None
            raise
        return lock

    def _prepare(self) -> None:
        file = self._file
        (version,), (application,) = (
            file.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "application_id")
        )
        empty = not file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and application != _APPLICATION:
            raise InputError(f"{self.path}: is a database, but not one of verdicts; give another file")
        if version > _VERSION:
            raise InputError(f"{self.path}: is of version {version}, this reads up to {_VERSION}; update this package")
        file.execute("PRAGMA foreign_keys=ON")
        if self.read_only:
            file.execute("PRAGMA query_only=ON")
        else:
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=FULL")
        if empty:
            if self.read_only:
                raise InputError(f"{self.path}: is empty; there is nothing to read")
            meta = {
                "features": self._hash,
                "described": json.dumps({"features": self.features, "units": self.units, "steps": self.steps}),
                "secret": secrets.token_hex(32),
            }
            file.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                file.execute(statement)
            file.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            file.execute(f"PRAGMA application_id={_APPLICATION}")
            file.execute(f"PRAGMA user_version={_VERSION}")
            file.execute("COMMIT")
            self.path.chmod(0o600)
        found = self._meta("features")
        if found != self._hash:
            raise InputError(f"{self.path}: {self._difference(json.loads(self._meta('described')))}")

    def _meta(self, key: str) -> str:
        return str(self._file.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])

    def _difference(self, there: dict[str, Any]) -> str:
        """Say where the features of the file and those of the model part."""
        what = "its verdicts are about other features than the model's: "
        if there["steps"] != self.steps:
            what += f"{there['steps']} steps there, {self.steps} here"
        else:
            pairs = zip(zip(there["features"], there["units"], strict=True), self._described, strict=False)
            odd = next((pair for pair in pairs if pair[0] != pair[1]), None)
            if odd is None:
                what += f"{len(there['features'])} of them there, {len(self.features)} here"
            else:
                told = [f"'{name}'" + (f" in {unit}" if unit else "") for name, unit in odd]
                what += f"{told[0]} there, {told[1]} here"
        return what + "; give the model they were made with, or a new file"

    def _replay(self) -> None:
        """Take in what the file holds."""
        self._known |= set(self._file.execute("SELECT annotator, action FROM actions").fetchall())
        for number, action, one in self._rows(0):
            self._take(number, action, one)
        for annotator, number in self._file.execute("SELECT annotator, max(number) FROM rounds GROUP BY annotator"):
            self._open[annotator] = number

    def _rows(self, after: int) -> list[tuple[int, str, Annotation]]:
        found = self._file.execute(
            "SELECT id, action, instance, step, feature, verdict, seconds, annotator, round, model, note, undo FROM log"
            " WHERE id > ? ORDER BY id",
            (after,),
        ).fetchall()
        return [(row[0], row[1], Annotation(*row[2:11], undo=bool(row[11]))) for row in found]

    def _take(self, number: int, action: str, one: Annotation) -> None:
        """Bring what is kept in memory up to one more line of the log."""
        self._version = number
        self._efforts[one.annotator] = self._efforts.get(one.annotator, 0.0) + one.seconds
        pile = self._piles.setdefault(one.key, [])
        self._instances.setdefault(one.instance, set()).add(one.key)
        given = self._actions.setdefault(one.annotator, [])
        if one.undo:
            if pile:
                undone = pile.pop()[1]
                for position in range(len(given) - 1, -1, -1):
                    if given[position][0] == undone:
                        given[position][1].remove(one.key)
                        if not given[position][1]:
                            del given[position]
                        break
        else:
            pile.append((number, action, one))
            if not given or given[-1][0] != action:
                given.append((action, []))
            given[-1][1].append(one.key)

    @property
    def version(self) -> int:
        """Number of lines of the log: it grows with every change."""
        return self._version

    def refresh(self) -> int:
        """Take in what another process has written, and return the version; for a store that is open to read only."""
        with self._lock:
            for number, action, one in self._rows(self._version):
                self._take(number, action, one)
            return self._version

    def close(self) -> None:
        """Let go of the file. It is complete at any time: closing saves nothing that was not saved."""
        with self._lock:
            self._file.close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> AnnotationStore:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def add(self, annotations: Iterable[Annotation], *, action: str = "") -> bool:
        """Append verdicts, all of them or none.

        Parameters
        ----------
        annotations : of one annotator, made at one time; their round is set to the annotator's open round where it is 0
        action : a name of the caller's choice. A second call with the same name and annotator does nothing, so that a
            page which never saw the answer to its first call may call again

        Returns
        -------
        Whether this was new. The verdicts are on disk either way.

        Raises
        ------
        InputError
            For features and steps that the store is not about, several annotators at once, and lines that undo: `undo`
            makes those.
        """
        given = list(annotations)
        for one in given:
            if one.feature not in self._columns:
                raise UnknownKeyError(
                    f"feature '{one.feature}' is not known; the model has {', '.join(self.features[:8])} ..."
                )
            if one.step >= self.steps:
                raise InputError(f"step {one.step}: there are {self.steps} steps, counted from 0")
            if one.undo:
                raise InputError("undo: call undo() to take a verdict back")
        people = {one.annotator for one in given}
        if len(people) != 1:
            raise InputError(f"annotations: of one annotator at a time, got {len(people)}")
        (annotator,) = people
        with self._lock:
            number = self.round(annotator)
            return self._append(annotator, [one if one.round else replace(one, round=number) for one in given], action)

    def _append(self, annotator: str, rows: Sequence[Annotation], action: str) -> bool:
        if self.read_only:
            raise InputError(f"{self.path}: is open to read only")
        action = action or secrets.token_hex(8)
        with self._lock:
            if (annotator, action) in self._known:
                return False
            number, now = self._version, time.time()
            lines = [
                (line, now, action, *(value for name, value in vars(one).items() if name != "undo"), int(one.undo))
                for line, one in enumerate(rows, number + 1)
            ]
            with self._transaction():
                self._file.execute("INSERT INTO actions VALUES (?, ?)", (annotator, action))
                self._file.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", lines)
            self._known.add((annotator, action))
            for place, one in enumerate(rows, 1):
                self._take(number + place, action, one)
            return True

    @contextmanager
    def _transaction(self) -> Generator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    def undo(self, annotator: str, *, action: str = "") -> list[Annotation]:
        """Take an annotator's last action that stands back.

        Parameters
        ----------
        annotator : whose
        action : as for `add`

        Returns
        -------
        The verdicts that no longer stand, none if there is nothing to take back.
        """
        with self._lock:
            given = self._actions.get(annotator)
            if not given or (annotator, action) in self._known:
                return []
            # From the last cell to the first: a cell that the action has twice is taken back twice.
            return self._take_back(annotator, list(reversed(given[-1][1])), action)

    def _take_back(self, annotator: str, keys: Sequence[tuple[str, int, str, str]], action: str) -> list[Annotation]:
        depth: dict[tuple[str, int, str, str], int] = {}
        gone: list[Annotation] = []
        for key in keys:
            depth[key] = depth.get(key, 0) + 1
            gone.append(self._piles[key][-depth[key]][2])
        if gone:
            self._append(annotator, [replace(one, undo=True, seconds=0.0) for one in gone], action)
        return gone

    def revert_round(self, annotator: str, number: int, *, action: str = "") -> list[Annotation]:
        """Take every standing verdict of an annotator's round back; what stood before it stands again.

        Parameters
        ----------
        annotator : whose
        number : of the round
        action : as for `add`

        Returns
        -------
        The verdicts that no longer stand. A verdict of a later round on the same cell stays, with all that is under it.
        """
        with self._lock:
            if (annotator, action) in self._known:
                return []
            keys: list[tuple[str, int, str, str]] = []
            for key, pile in self._piles.items():
                if key[3] == annotator:
                    top = len(pile)
                    while top and pile[top - 1][2].round == number:
                        top -= 1
                        keys.append(key)
            return self._take_back(annotator, keys, action)

    def standing(self) -> list[Annotation]:
        """Return the verdicts that stand, in the order in which they were given; see `ial_nap.annotations.latest`."""
        with self._lock:
            tops = [pile[-1] for pile in self._piles.values() if pile]
        return [one for _, _, one in sorted(tops, key=lambda top: top[0])]

    def of_instance(self, instance: str) -> list[Annotation]:
        """Return what stands about one instance, in the order in which it was said.

        Parameters
        ----------
        instance : id; nothing stands about one that is not known
        """
        with self._lock:
            tops = [self._piles[key][-1] for key in self._instances.get(instance, ()) if self._piles[key]]
        return [one for _, _, one in sorted(tops, key=lambda top: top[0])]

    def of_cell(self, instance: str, step: int, feature: str, annotator: str) -> Annotation | None:
        """Return the verdict that stands, or nothing.

        Parameters
        ----------
        instance, step, feature : the cell
        annotator : whose verdict
        """
        with self._lock:
            pile = self._piles.get((instance, step, feature, annotator))
            return pile[-1][2] if pile else None

    def log(self) -> list[Annotation]:
        """Return every line ever written, oldest first: what `ial_nap.annotations.to_jsonl` exports."""
        with self._lock:
            return [one for _, _, one in self._rows(0)]

    def disagreements(self) -> list[Disagreement]:
        """Return the cells on which annotators disagree; see `ial_nap.annotations.disagreements`."""
        return disagreements(self.standing())

    def context_hash(self) -> str:
        """Return the hash of what stands; see `ial_nap.annotations.context_hash`."""
        return context_hash(self.standing())

    def efforts(self) -> list[Effort]:
        """Return what each annotator has put in, by name."""
        with self._lock:
            counts: dict[str, tuple[int, set[str]]] = {who: (0, set()) for who in self._efforts}
            for (instance, _, _, annotator), pile in self._piles.items():
                if pile:
                    verdicts, instances = counts[annotator]
                    instances.add(instance)
                    counts[annotator] = verdicts + 1, instances
            return [Effort(who, count, len(seen), self._efforts[who]) for who, (count, seen) in sorted(counts.items())]

    def round(self, annotator: str) -> int:
        """Return the number of an annotator's open round, counted from 1.

        Parameters
        ----------
        annotator : whose
        """
        return self._open.get(annotator, 0) + 1

    def has(self, annotator: str, action: str) -> bool:
        """Return whether an action of this name is on disk already.

        Parameters
        ----------
        annotator : whose
        action : its name, as for `add`
        """
        with self._lock:
            return (annotator, action) in self._known

    def close_round(self, closed: Round, *, action: str = "") -> Round:
        """Write down what a round did to the score, and open the next one.

        Parameters
        ----------
        closed : the annotator's open round; its verdicts and seconds are counted here
        action : as for `add`: a second call with the same name returns the round that the first one closed

        Returns
        -------
        The round as it was written.

        Raises
        ------
        InputError
            For a round that is not the open one.
        """
        if self.read_only:
            raise InputError(f"{self.path}: is open to read only")
        with self._lock:
            if (closed.annotator, action) in self._known:
                return self.rounds(closed.annotator)[-1]
            if closed.number != self.round(closed.annotator):
                raise InputError(
                    f"round {closed.number}: '{closed.annotator}' is in round {self.round(closed.annotator)}"
                )
            mine = [one for one in self.standing() if one.annotator == closed.annotator and one.round == closed.number]
            done = replace(closed, verdicts=len(mine), seconds=sum((one.seconds for one in mine), 0.0))
            scores = [None if math.isnan(value) else value for value in (done.before, done.value, done.low, done.high)]
            row = (time.time(), done.annotator, done.number, done.model, done.metric, done.better, *scores)
            with self._transaction():
                if action:
                    self._file.execute("INSERT INTO actions VALUES (?, ?)", (done.annotator, action))
                self._file.execute(
                    "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, done.verdicts, done.seconds),
                )
            if action:
                self._known.add((done.annotator, action))
            self._open[done.annotator] = done.number
            return done

    def rounds(self, annotator: str | None = None) -> list[Round]:
        """Return the closed rounds in the order they were closed.

        Parameters
        ----------
        annotator : whose; everybody's by default
        """
        with self._lock:
            rows = self._file.execute(
                "SELECT annotator, number, model, metric, better, before, value, low, high, verdicts, seconds"
                " FROM rounds ORDER BY time, number"
            ).fetchall()
        return [
            Round(*row[:5], *(math.nan if value is None else value for value in row[5:9]), *row[9:])
            for row in rows
            if annotator in {None, row[0]}
        ]

    def queue(self, annotator: str, number: int) -> list[dict[str, Any]] | None:
        """Return what `keep_queue` kept, or nothing.

        Parameters
        ----------
        annotator, number : of the round
        """
        with self._lock:
            row = self._file.execute(
                "SELECT items FROM queues WHERE annotator = ? AND round = ?", (annotator, number)
            ).fetchone()
        return json.loads(row[0]) if row else None

    def keep_queue(self, annotator: str, number: int, items: Sequence[dict[str, Any]]) -> None:
        """Keep the queue of a round, so that the annotator finds the same one after a crash.

        Parameters
        ----------
        annotator, number : of the round; a queue that is already kept for it stays
        items : anything that goes into JSON
        """
        with self._lock:
            self._file.execute(
                "INSERT OR IGNORE INTO queues VALUES (?, ?, ?)", (annotator, number, json.dumps(list(items)))
            )

    def token(self, annotator: str) -> str:
        """Return the secret word that lets an annotator in: the same one after every start.

        Parameters
        ----------
        annotator : whose
        """
        with self._lock:
            secret = self._meta("secret")
        return hmac.new(secret.encode(), annotator.encode(), "sha256").hexdigest()[:32]

    def backup(self, path: str | Path) -> None:
        """Copy the whole store into another file while it is in use.

        Parameters
        ----------
        path : that does not exist yet
        """
        if Path(path).exists():
            raise InputError(f"{path}: exists; give the name of a new file")
        with self._lock, closing(sqlite3.connect(path)) as copy:
            self._file.backup(copy)
        Path(path).chmod(0o600)
