"""Runs queries that nobody has read on SQLite databases: read-only, with limits on time, rows, values and syntax."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from posttrain.core import GradeError
from posttrain.grade.sql_compare import Row, Value
from posttrain.grade.sql_syntax import MAX_EXPANSION, expansion

SAFE_FUNCTIONS = frozenset(
    """-> ->> abs acos acosh asin asinh atan atan2 atanh avg bm25 ceil ceiling char coalesce cos cosh count cume_dist
    current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor format glob
    group_concat hex highlight ifnull iif instr json json_array json_array_length json_extract json_group_array
    json_group_object json_insert json_object json_patch json_quote json_remove json_replace json_set json_type
    json_valid julianday lag last_value lead length like likelihood likely ln log log10 log2 lower ltrim match max min
    mod nth_value ntile nullif octet_length percent_rank pi pow power printf quote radians rank replace round row_number
    rtrim sign sin sinh snippet sqrt strftime string_agg substr substring sum tan tanh time timediff total trim trunc
    typeof unhex unicode unixepoch unlikely upper zeroblob concat concat_ws""".split()
)
# Virtual tables that show the inside of the connection or file rather than its data.
_FORBIDDEN_TABLES = re.compile(
    r"pragma_|sqlite_(?!master$|schema$|sequence$|stat\d)|dbstat|fts3tokenize|fts5vocab|fts4aux"
)
_ALLOWED_ACTIONS = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE))
_MAX_AUTHORISATIONS = 5_000  # what one query may ask for while it is compiled
_MAX_CALLS = 100  # functions named in one query
_OPEN_PER_THREAD = 16  # databases kept open by each thread
_MAX_SQL = 20_000  # characters
_STEPS = 5_000  # virtual machine steps between two looks at the clock
_SLOW_STEPS = 200  # where a single step can take milliseconds
_SLOW = re.compile(r"instr|replace", re.IGNORECASE)
_EXPLAIN = re.compile(r"(?:\s|;|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*explain\b", re.IGNORECASE)
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{4,})")
_TIME_DEPENDENT = re.compile(r"now|current_|date\s*\(|time\s*\(|julianday|unixepoch|strftime", re.IGNORECASE)


class QueryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a query may use. The clock is the thread's CPU time, so a busy machine does not change a verdict."""

    timeout_s: float = 1.0  # CPU seconds; ten times as many by the wall clock
    max_rows: int = 10_000
    max_value_bytes: int = 100_000  # of any text or blob, also in the middle of a calculation
    max_result_bytes: int = 20_000_000


class QueryResult(msgspec.Struct, frozen=True, kw_only=True):
    """Rows, or why there are none. `rows` is None if and only if `error` says why."""

    rows: tuple[Row, ...] | None = None
    error: str | None = None
    timed_out: bool = False
    size: int = 0  # bytes, roughly


class _Refusal(Exception):
    """A limit was passed; the message says which."""


class _Session:
    """One connection of one thread to one database, with everything forbidden but reading."""

    def __init__(self, path: Path, limits: QueryLimits) -> None:
        self._limits = limits
        self._cpu_deadline_s = self._wall_deadline_s = 0.0
        self._refused: str | None = None
        self._timed_out = False
        self._asked = self._calls = 0
        # immutable: no locks and no journal are looked for, so nothing is ever written beside the file.
        self._connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1",
            uri=True,
            isolation_level=None,
            cached_statements=0,
            check_same_thread=False,  # it is used by one thread, and may be closed by another at the end
        )
        self._connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        self._connection.execute("PRAGMA query_only = ON")
        self._open_virtual_tables()
        self._formats = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._limit(self._connection, limits)
        self._limit(self._formats, limits)
        self._replace_functions()
        self._connection.set_authorizer(self._authorise)

    def _open_virtual_tables(self) -> None:
        """Virtual tables declare themselves when first named, which the authoriser would refuse."""
        made = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'create virtual%'"
        quoted = ['"' + name.replace('"', '""') + '"' for (name,) in self._connection.execute(made).fetchall()]
        for table in ("json_each('[]')", "json_tree('[]')", *quoted):
            self._connection.execute(f"SELECT 1 FROM {table} LIMIT 0").fetchall()

    def close(self) -> None:
        self._connection.close()
        self._formats.close()

    def run(self, sql: str) -> QueryResult:
        """Run one statement to its end or its limits."""
        self._refused, self._timed_out, self._asked, self._calls = None, False, 0, 0
        self._cpu_deadline_s = time.thread_time() + self._limits.timeout_s
        self._wall_deadline_s = time.monotonic() + 10 * self._limits.timeout_s
        self._connection.set_progress_handler(self._progress, _SLOW_STEPS if _SLOW.search(sql) else _STEPS)
        try:
            return self._fetch(sql)
        except _Refusal as refusal:
            return QueryResult(error=str(refusal))
        except MemoryError:
            return QueryResult(error="out of memory")
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            if self._timed_out:
                return QueryResult(error=f"timeout: more than {self._limits.timeout_s:g} s", timed_out=True)
            return QueryResult(error=self._refused or str(error))

    def _fetch(self, sql: str) -> QueryResult:
        cursor = self._connection.execute(sql)
        try:
            if cursor.description is None:
                raise _Refusal("not a query")
            rows: list[Row] = []
            size = 0
            for row in cursor:
                if len(rows) == self._limits.max_rows:
                    raise _Refusal(f"too many rows: more than {self._limits.max_rows}")
                size += 64 + sum(len(value) if isinstance(value, str | bytes) else 16 for value in row)
                if size > self._limits.max_result_bytes:
                    raise _Refusal(f"result too large: more than {self._limits.max_result_bytes} bytes")
                rows.append(row)
        finally:
            cursor.close()
        return QueryResult(rows=tuple(rows), size=size)

    def _progress(self) -> bool:
        """Called every so many steps; True stops the query."""
        self._timed_out = time.thread_time() > self._cpu_deadline_s or time.monotonic() > self._wall_deadline_s
        return self._timed_out

    def _authorise(self, action: int, one: str | None, two: str | None, database: str | None, by: str | None) -> int:
        self._asked += 1
        if self._asked > _MAX_AUTHORISATIONS:
            self._refused = "the query is too complex"
        elif action in _ALLOWED_ACTIONS:
            return sqlite3.SQLITE_OK
        elif action == sqlite3.SQLITE_PRAGMA and one == "data_version" and two is None:
            return sqlite3.SQLITE_OK  # a number that full-text search asks for
        elif action == sqlite3.SQLITE_READ:
            if not _FORBIDDEN_TABLES.match((one or "").lower()):
                return sqlite3.SQLITE_OK
            self._refused = f"not allowed: reading {one}"
        elif action == sqlite3.SQLITE_FUNCTION:
            self._calls += 1
            if self._calls > _MAX_CALLS:
                self._refused = f"the query is too complex: more than {_MAX_CALLS} function calls"
            elif (two or "").lower() in SAFE_FUNCTIONS:
                return sqlite3.SQLITE_OK
            else:
                self._refused = f"not allowed: function {two}"
        else:
            self._refused = "not allowed: only a single SELECT may run"
        return sqlite3.SQLITE_DENY

    @staticmethod
    def _limit(connection: sqlite3.Connection, limits: QueryLimits) -> None:
        for category, limit in (
            (sqlite3.SQLITE_LIMIT_LENGTH, limits.max_value_bytes),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4 * _MAX_SQL),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_COLUMN, 500),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
            (sqlite3.SQLITE_LIMIT_VDBE_OP, 200_000),
            (sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 32),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
            (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 0),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            connection.setlimit(category, limit)

    def _replace_functions(self) -> None:
        """Stand-ins for functions of which one call can take seconds, where nothing can interrupt it."""

        def built_in(name: str, arguments: tuple[Value, ...]) -> Value:
            marks = ",".join("?" * len(arguments))
            row: Row = self._formats.execute(f"SELECT {name}({marks})", arguments).fetchone()
            return row[0]

        def formatted(*arguments: Value) -> Value:
            if arguments and _WIDE_FORMAT.search(str(arguments[0])):
                self._refused = "not allowed: printf or format with a width of more than 999"
                raise ValueError(self._refused)
            return built_in("printf", arguments)

        def trimmer(name: str, strip: Callable[[str, str], str]) -> Callable[[Value, Value], Value]:
            def trimmed(text: Value, characters: Value) -> Value:
                if isinstance(text, str) and isinstance(characters, str):
                    return strip(text, "".join(set(characters))) if characters else text
                return built_in(name, (text, characters))

            return trimmed

        for name in ("printf", "format"):
            self._connection.create_function(name, -1, formatted, deterministic=True)
        for name, strip in (("trim", str.strip), ("ltrim", str.lstrip), ("rtrim", str.rstrip)):
            self._connection.create_function(name, 2, trimmer(name, strip), deterministic=True)


class QueryRunner:
    """Runs queries on any number of databases from any number of threads, and remembers what it has run.

    Each thread has its own connections. A database is taken as it is when first opened and must not change while the
    runner lives; one in WAL mode must be checkpointed first.

    Args:
        limits: what each query may use.
        remember_bytes: results that are kept, together; the least recently used go first. Queries that ask for the
            time are never remembered.
    """

    def __init__(self, limits: QueryLimits, remember_bytes: int = 128_000_000) -> None:
        self.limits = limits
        self._remember_bytes = remember_bytes
        self._results: OrderedDict[tuple[Path, str], QueryResult] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._threads = threading.local()

    def remembered(self, database: Path, sql: str) -> QueryResult | None:
        """The result of a query that was run before, if it is still held."""
        with self._lock:
            result = self._results.get((database, sql))
            if result is not None:
                self._results.move_to_end((database, sql))
            return result

    def run(self, database: Path, sql: str) -> QueryResult:
        """Run one query, or remember its result.

        Raises:
            GradeError: the database cannot be opened.
        """
        result = self.remembered(database, sql)
        if result is not None:
            return result
        if _EXPLAIN.match(sql):
            return QueryResult(error="not a query: EXPLAIN")
        if len(sql) > _MAX_SQL:
            return QueryResult(error=f"the query is longer than {_MAX_SQL} characters")
        if expansion(sql) > MAX_EXPANSION:
            return QueryResult(error="the query is too complex: its common table expressions multiply")
        result = self._session(database).run(sql)
        if not _TIME_DEPENDENT.search(sql):
            self._remember((database, sql), result)
        return result

    def _session(self, database: Path) -> _Session:
        sessions: OrderedDict[Path, _Session] | None = getattr(self._threads, "sessions", None)
        if sessions is None:
            sessions = self._threads.sessions = OrderedDict()
        session = sessions.get(database)
        if session is None:
            if not database.is_file():
                raise GradeError(f"{database}: no such database")
            try:
                session = _Session(database, self.limits)
            except sqlite3.Error as error:
                raise GradeError(f"{database}: cannot be opened as a SQLite database: {error}") from error
            sessions[database] = session
            if len(sessions) > _OPEN_PER_THREAD:
                sessions.popitem(last=False)[1].close()
        sessions.move_to_end(database)
        return session

    def _remember(self, key: tuple[Path, str], result: QueryResult) -> None:
        cost = result.size + len(key[1]) + 500
        if cost > self._remember_bytes // 4:
            return
        with self._lock:
            if key in self._results:
                return
            self._results[key] = result
            self._held_bytes += cost
            while self._held_bytes > self._remember_bytes:
                (_, sql), oldest = self._results.popitem(last=False)
                self._held_bytes -= oldest.size + len(sql) + 500
