"""`pgvae load`: files of all kinds into a real table, and what cannot be read kept with its reason."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from conftest import as_role
from pgvae.errors import PgvaeError
from pgvae.load.run import LoadSummary, _refuse_too_many
from pgvae.load.types import Bad, Dialect, converter, infer, infer_time, proved_order

RunCli = Callable[..., subprocess.CompletedProcess[str]]

CSV = """\
CustomerID,StockCode,InvoiceDate,Quantity,UnitPrice
17850.0,85123A,2010-12-01 08:26:00,6,2.55
17850.0,71053,2010-12-01 08:26:00,-1,3.39
,00123,2010-12-01 08:28:00,2,
"""


def rows(dsn: str, query: str = "select * from public.events order by 2") -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query).fetchall()


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.fixture
def csv_file(tmp_path: Path) -> str:
    return write(tmp_path / "events.csv", CSV)


def test_columns_are_known_by_their_usual_names_and_typed(empty_database: str, run_cli: RunCli, csv_file: str) -> None:
    done = run_cli("load", "events", csv_file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "3 rows loaded into public.events" in done.stdout
    with psycopg.connect(empty_database) as connection:
        cursor = connection.execute(
            "select user_id, item_id, occurred_at, quantity, price from events order by item_id"
        )
        types = [connection.adapters.types[column.type_code].name for column in cursor.description or ()]
        assert types == ["int8", "text", "timestamptz", "int8", "numeric"]
        found = [tuple(str(value) for value in row) for row in cursor.fetchall()]
    assert found == [
        ("None", "00123", "2010-12-01 08:28:00+00:00", "2", "None"),
        ("17850", "71053", "2010-12-01 08:26:00+00:00", "-1", "3.39"),
        ("17850", "85123A", "2010-12-01 08:26:00+00:00", "6", "2.55"),
    ]
    indexes = rows(empty_database, "select indexdef from pg_indexes where tablename = 'events'")
    assert sorted(str(index).partition("btree ")[2] for (index,) in indexes) == [
        "(item_id, occurred_at)",
        "(user_id, occurred_at)",
    ]
    comment = rows(empty_database, "select col_description('public.events'::regclass, 1)")
    assert comment == [("Key of the user.",)]


@pytest.mark.parametrize(
    "compress", [gzip.compress, lzma.compress, lambda data: zstandard.ZstdCompressor().compress(data)]
)
def test_compressed_files_are_known_by_their_content(
    empty_database: str, run_cli: RunCli, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    file = write(tmp_path / "no-telling-name", compress(CSV.encode()))
    assert run_cli("load", "events", file, "--yes", dsn=empty_database).returncode == 0
    assert len(rows(empty_database)) == 3


def test_standard_input_is_loaded_and_never_waited_for(empty_database: str, run_cli: RunCli) -> None:
    refused = run_cli("load", "events", "-", dsn=empty_database, input=CSV)
    assert refused.returncode == 1
    assert "--yes" in refused.stderr
    assert run_cli("load", "events", "-", "--yes", dsn=empty_database, input=CSV).returncode == 0
    assert len(rows(empty_database)) == 3


def test_parquet_goes_the_same_way(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "user": pyarrow.array([1, None, 3], pyarrow.int64()),
            "sku": ["a", "b\tc\\", "d\n'e"],
            "ts": [datetime(2024, 1, day, 12, tzinfo=UTC) for day in (1, 2, 3)],
            "event": ["view", "buy", None],
        }
    )
    parquet.write_table(table, tmp_path / "events.parquet")
    done = run_cli("load", "events", str(tmp_path / "events.parquet"), "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, "select user_id, item_id, event_type, occurred_at from events order by item_id") == [
        (1, "a", "view", datetime(2024, 1, 1, 12, tzinfo=UTC)),
        (None, "b\tc\\", "buy", datetime(2024, 1, 2, 12, tzinfo=UTC)),
        (3, "d\n'e", None, datetime(2024, 1, 3, 12, tzinfo=UTC)),
    ]


def test_times_of_parquet_are_read_to_the_microsecond_and_those_of_no_calendar_are_rejected(
    empty_database: str, run_cli: RunCli, tmp_path: Path
) -> None:
    at = 1_700_000_000
    table = pyarrow.table(
        {
            "user": [*range(20), 20],
            "item": ["a"] * 21,
            "ts": pyarrow.array([at * 10**9 + 123_456_789] * 21, pyarrow.timestamp("ns")),
            # Of the last one the year is 11476.
            "seen_at": pyarrow.array([at * 10**6] * 20 + [3 * 10**17], pyarrow.timestamp("us", "Europe/Berlin")),
            "born_on": pyarrow.array([date(1990, 2, 1)] * 21),
            "opens_at": pyarrow.array([3600 * 10**9 + 1] * 21, pyarrow.time64("ns")),
        }
    )
    parquet.write_table(table, tmp_path / "events.parquet")
    done = run_cli("load", "events", str(tmp_path / "events.parquet"), "--yes", "--type", "seen_at=timestamptz",
                   dsn=empty_database)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 rejected" in done.stdout
    assert rows(empty_database, "select distinct occurred_at, seen_at, born_on, opens_at::text from events") == [
        (
            datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC),
            datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
            date(1990, 2, 1),
            "01:00:00",
        )
    ]


def test_floats_of_parquet_are_keys_and_times_and_none_where_they_are_no_number(
    empty_database: str, run_cli: RunCli, tmp_path: Path
) -> None:
    # As pandas writes whole numbers of which some are missing.
    table = pyarrow.table(
        {
            "user": [1.0, float("nan"), 3.0],
            "item": ["a", "b", "c"],
            "ts": [1577836800.0, 1577836801.0, 1577836802.5],
            "price": [1.0, 2.5, float("nan")],
        }
    )
    parquet.write_table(table, tmp_path / "events.parquet")
    done = run_cli("load", "events", str(tmp_path / "events.parquet"), "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "0 rejected" in done.stdout or "rejected" not in done.stdout
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    assert rows(empty_database, "select user_id, item_id, occurred_at, price::float8 from events order by item_id") == [
        (1, "a", begin, 1.0),
        (None, "b", begin + timedelta(seconds=1), 2.5),
        (3, "c", begin + timedelta(seconds=2.5), None),
    ]
    assert rows(empty_database, "select pg_typeof(user_id)::text from events limit 1") == [("bigint",)]


def test_rejected_rows_are_kept_with_line_and_reason(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    good = "".join(f'{n},"two\nlines {n}",2024-01-01T00:00:00Z,1\n' for n in range(60_000))
    bad = b"x1,a,2024-01-01,1\n5,b,2024-13-01,1\n6,c\n7,\xff\xfe,2024-01-01,1\n99999999999999999999,e,2024-01-01,1\n"
    # The wrong rows stand beyond the sample, where nothing was known of them.
    file = write(tmp_path / "events.csv", b"user_id,item_id,ts,n\n" + good.encode() + bad)
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "5 rejected" in done.stdout
    first = 2 + 2 * 60_000
    found = rows(empty_database, "select line_number, reason from events_rejects order by line_number")
    assert [line for line, _ in found] == [first, first + 1, first + 2, first + 3, first + 4]
    for reason, words in zip(
        (str(reason) for _, reason in found),
        ("user_id: 'x1'", "occurred_at: '2024-13-01'", "2 fields where the header has 4", "item_id", "range"),
        strict=True,
    ):
        assert words in reason
    assert rows(empty_database, "select count(*) from events") == [(60_000,)]


@pytest.mark.parametrize("table", ["My Shop.o'clock", '"My Shop"."o\'clock"'])
def test_rejected_rows_and_names_are_told_as_they_were_written(
    empty_database: str, run_cli: RunCli, tmp_path: Path, table: str
) -> None:
    good = "".join(f"{n};a;2024-01-01\n" for n in range(30))
    file = write(tmp_path / "events.csv", "user_id;item_id;ts\n" + good + '5;"b;c"\n' + "x1;a,b;2024-01-01\n")
    done = run_cli("load", "events", file, "--yes", "--type=user_id=bigint", f"--table={table}", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, """select raw_line from "My Shop"."o'clock_rejects" order by line_number""") == [
        ('5;"b;c"',),
        ("x1;a,b;2024-01-01",),
    ]
    # What it says to do next can be done.
    (call,) = re.findall(r"select \* from vae.create_model\('shop', events => ('.*')\)", done.stdout)
    assert rows(empty_database, f"select {call}::regclass is not null") == [(True,)]


def test_too_many_rejects_load_nothing(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    lines = "".join(f"{n},a,2024-01-01\n" for n in range(50_000)) + "".join(
        f"z{n},a,2024-01-01\n" for n in range(20_000)
    )
    file = write(tmp_path / "events.csv", "user_id,item_id,ts\n" + lines)
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 1
    assert "20000 of 70000 rows are rejected" in done.stderr
    assert "--type" in done.stderr
    assert rows(empty_database, "select to_regclass('public.events'), to_regclass('public.events_rejects')") == [
        (None, None)
    ]
    allowed = run_cli("load", "events", file, "--yes", "--type", "user_id=text", dsn=empty_database)
    assert allowed.returncode == 0, allowed.stderr
    assert rows(empty_database, "select count(*) from events") == [(70_000,)]


def test_every_character_comes_through(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    ids = ["O'Neil", 'say "hi"', "back\\slash", "\\N", "NULL", "{a,b}", "tab\there", "x" * 10_000]
    ids += [chr(0x10000 * plane + 0x61) for plane in range(17)]
    lines = "".join('1,"' + key.replace('"', '""') + '",2024-01-01T00:00:00Z\n' for key in ids)
    file = write(tmp_path / "events.csv", "user_id,item_id,ts\n" + lines)
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert {row[0] for row in rows(empty_database, "select item_id from events")} == set(ids)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7", "+12", "-3", "", "8.0", "9."], "bigint"),
        (["9223372036854775807", "-9223372036854775808"], "bigint"),
        (["9223372036854775808"], "text"),
        # A key with zeros in front, a telephone number.
        (["007", "12"], "text"),
        (["007.5", "12"], "text"),
        (["1.5", ".5", "-1e3"], "numeric"),
        (["1.234,50", "2"], "numeric"),
        (["01,5", "2"], "text"),
        # Thousands, as far as anybody can tell.
        (["1,234", "2,500"], "text"),
        (["1", "0"], "bigint"),
        (["true", "F", "no"], "boolean"),
        (["true", "perhaps"], "text"),
        (["550e8400-e29b-41d4-a716-446655440000"], "uuid"),
        (["13/01/2010", "01.02.2010"], "date"),
        (["13/01/2010", "01/02/2010 10:00"], "timestamptz"),
        (["13/13/2010"], "text"),
        (["2010-01-01"], "date"),
        (["2010-01-01", "2010-01-01T10:00Z"], "timestamptz"),
        (["20100101T10"], "text"),
        (["", " "], "text"),
    ],
)
def test_a_column_has_the_narrowest_type_of_its_values(values: list[str], expected: str) -> None:
    assert infer(values, Dialect())[0] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2010-01-01 10:00"] * 9 + ["never"], "timestamptz"),
        (["2010-01-01 10:00"] * 8 + ["never"], "text"),
        (["1262304000"], "timestamptz"),
        (["99999999"], "bigint"),
    ],
)
def test_a_column_that_must_hold_times_may_hold_a_few_that_are_none(values: list[str], expected: str) -> None:
    assert infer_time(values, Dialect())[0] == expected


def test_a_number_above_twelve_proves_the_order_of_day_and_month() -> None:
    found = [proved_order([date]) for date in ("13/12/2010", "12/13/2010", "12/12/2010", "2010-12-13")]
    assert found == ["dmy", "mdy", None, None]


def test_as_many_rejects_as_are_allowed_are_not_too_many() -> None:
    _refuse_too_many(LoadSummary(rows=7), 0.0)
    _refuse_too_many(LoadSummary(rows=3, rejected=1), 0.25)
    with pytest.raises(PgvaeError, match="1 of 3 rows are rejected"):
        _refuse_too_many(LoadSummary(rows=2, rejected=1), 0.25)


BERLIN = Dialect(timezone=ZoneInfo("Europe/Berlin"), nulls=frozenset({"", "n/a"}))


@pytest.mark.parametrize(
    ("sql_type", "text", "expected"),
    [
        ("smallint", "32767", "32767"),
        ("smallint", "32768", None),
        ("smallint", "-32768", "-32768"),
        ("integer", "2147483648", None),
        ("bigint", "+7.00", "7"),
        ("bigint", "7.5", None),
        ("bigint", " ", "\\N"),
        ("bigint", "n/a", "\\N"),
        ("numeric", " 1e3 ", "1e3"),
        ("numeric", "1,5", None),
        ("boolean", "YES", "t"),
        ("boolean", "no", "f"),
        ("boolean", "1", "t"),
        ("boolean", "2", None),
        ("uuid", "{550E8400-E29B-41D4-A716-446655440000}", "550e8400-e29b-41d4-a716-446655440000"),
        ("text", " a\tb\\N\r\n", " a\\tb\\\\N\\r\\n"),
        ("text", "n/a", "\\N"),
        ("text", "a\0b", None),
        ("text", "\udce9", None),
        ("date", "31.12.2010", "2010-12-31"),
        ("date", "31.13.2010", None),
        ("timestamptz", "01/02/2010 12:30 am", "2010-02-01T00:30:00+01:00"),
        ("timestamptz", "01/02/2010 12:30 PM", "2010-02-01T12:30:00+01:00"),
        ("timestamptz", "01/02/2010 1:30 p.m.", "2010-02-01T13:30:00+01:00"),
        ("timestamptz", "01/02/2010 0:30 pm", None),
        ("timestamptz", "01/02/2010 13:30 pm", None),
        ("timestamptz", "2010-02-01 10:00Z", "2010-02-01T10:00:00+00:00"),
        ("timestamptz", "100000000", "1973-03-03T09:46:40+00:00"),
        ("timestamptz", "99999999999", "5138-11-16T09:46:39+00:00"),
        ("timestamptz", "1300000000.5", "2011-03-13T07:06:40.500000+00:00"),
        ("timestamptz", "1300000000123", "2011-03-13T07:06:40.123000+00:00"),
        ("timestamptz", "1300000000123456", "2011-03-13T07:06:40.123456+00:00"),
        ("timestamptz", "1300000000123456789", "2011-03-13T07:06:40.123456+00:00"),
        ("timestamptz", "soon", None),
    ],
)
def test_a_text_is_written_as_its_type_or_refused(sql_type: str, text: str, expected: str | None) -> None:
    found = converter(sql_type, BERLIN)(text)
    assert isinstance(found, Bad) == (expected is None)
    assert expected in (None, found)
    assert converter("numeric", BERLIN, decimal_commas=True)("1.234,50") == "1234.50"


@pytest.mark.parametrize(
    ("dates", "options", "expected"),
    [
        (["25/12/2010 08:26", "01/02/2011 09:00"], (), "2011-02-01 09:00:00+00"),
        (["12/25/2010 8:26", "01/02/2011 9:00"], (), "2011-01-02 09:00:00+00"),
        (["03/04/2010 8:26", "01/02/2011 9:00"], ("--date-order", "mdy"), "2011-01-02 09:00:00+00"),
        (["2010-01-01 00:00", "2011-01-02 09:00"], ("--timezone", "Europe/Berlin"), "2011-01-02 08:00:00+00"),
        (["1262304000", "1293958800"], ("--type", "occurred_at=timestamptz"), "2011-01-02 09:00:00+00"),
        (["1262304000", "1293958800"], (), "2011-01-02 09:00:00+00"),
        (["1262304000000", "1293958800000"], (), "2011-01-02 09:00:00+00"),
        (["1262304000000000", "1293958800000250"], (), "2011-01-02 09:00:00.00025+00"),
        (["1262304000000000000", "1293958800000250000"], (), "2011-01-02 09:00:00.00025+00"),
        (["1262304000.0", "1293958800.0"], (), "2011-01-02 09:00:00+00"),
        (["1262304000", "1293958800.25"], (), "2011-01-02 09:00:00.25+00"),
        (["12/25/2010 12:26 AM", "01/02/2011 9:00 PM"], (), "2011-01-02 21:00:00+00"),
        (["12/25/2010 12:26:00 am", "12/25/2010 12:26 a.m."], (), "2010-12-25 00:26:00+00"),
        (["25.12.2010 08:26", "01.02.2011 09:00"], (), "2011-02-01 09:00:00+00"),
    ],
)
def test_times_are_read_in_the_order_that_they_tell(
    empty_database: str, run_cli: RunCli, tmp_path: Path, dates: list[str], options: tuple[str, ...], expected: str
) -> None:
    file = write(tmp_path / "events.csv", "user,item,time\n" + "".join(f"1,a,{date}\n" for date in dates))
    done = run_cli("load", "events", file, "--yes", *options, dsn=empty_database)
    assert done.returncode == 0, done.stderr
    query = "select (max(occurred_at) at time zone 'UTC')::text || '+00' from events"
    assert rows(empty_database, query) == [(expected,)]


@pytest.mark.parametrize(
    ("rows_of_dates", "registered", "told"),
    [
        # What a column proves is for those that could be of both orders, whichever comes first.
        ([("01/02/2011", "01/25/2011"), ("03/04/2011", "02/01/2011")], ["2011-01-02", "2011-03-04"], True),
        # Where columns prove different orders each has its own.
        ([("25/02/2011", "01/25/2011"), ("03/04/2011", "02/01/2011")], ["2011-02-25", "2011-04-03"], False),
        # Long after the first rows.
        ([("", "2011-01-01")] * 1500 + [("01/25/2011", "2011-01-01")], ["2011-01-25"], False),
    ],
    ids=["proof beats guess", "proofs differ", "empty at first"],
)
def test_one_proof_decides_the_order_of_all_dates(
    empty_database: str,
    run_cli: RunCli,
    tmp_path: Path,
    rows_of_dates: list[tuple[str, str]],
    registered: list[str],
    told: bool,
) -> None:
    lines = "".join(f"1,a,{first},{second}\n" for first, second in rows_of_dates)
    file = write(tmp_path / "events.csv", "user,item,registered,time\n" + lines)
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert ("month before day, as in time" in done.stdout) == told
    assert "guess" not in done.stdout
    found = rows(empty_database, "select registered::text from events where registered is not null order by 1")
    assert [date for (date,) in found] == registered
    times = rows(empty_database, "select max(occurred_at at time zone 'UTC')::date::text from events")
    assert times == [("2011-02-01" if len(rows_of_dates) == 2 else "2011-01-01",)]


def test_a_few_broken_times_do_not_make_the_column_text(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    times = ["25.12.2010 08:26", "01.02.2011 09:00"] * 10 + ["never"]
    file = write(tmp_path / "events.csv", "user,item,time\n" + "".join(f"1,a,{time}\n" for time in times))
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "1 of 21 are no times, and will be rejected" in done.stdout
    assert rows(empty_database, "select reason from events_rejects") == [("occurred_at: 'never' is no time",)]
    assert rows(empty_database, "select count(*), pg_typeof(max(occurred_at))::text from events") == [
        (20, "timestamp with time zone")
    ]
    # A column that is mostly something else stays what it is, and the plan says what to do.
    other = write(tmp_path / "other.csv", "user,item,time\n1,a,2011-02-01\n1,a,morning\n")
    done = run_cli("load", "events", other, "--yes", "--replace", dsn=empty_database)
    assert "not read as times: --type occurred_at=timestamptz rejects what is none" in done.stdout


def test_what_python_reads_and_postgresql_does_not_stops_no_load(
    empty_database: str, run_cli: RunCli, tmp_path: Path
) -> None:
    file = write(tmp_path / "events.csv", "user,item,date,price\n1,2,2024-W01-1,１.５\n1,3,2024-01-02,2.5\n")
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, "select occurred_at::text, price from events order by 1") == [
        ("2024-01-01", "１.５"),
        ("2024-01-02", "2.5"),
    ]


@pytest.mark.parametrize(
    ("time", "options", "is_told"),
    [
        ("2024-01-01 10:00:00", (), True),
        ("2024-01-01T10:00:00Z", (), False),
        ("2024-01-01 10:00:00", ("--timezone", "Europe/Berlin"), False),
    ],
)
def test_times_without_a_zone_are_said_to_be_read_as_utc(
    empty_database: str, run_cli: RunCli, tmp_path: Path, time: str, options: tuple[str, ...], is_told: bool
) -> None:
    file = write(tmp_path / "events.csv", f"user,item,ts\n1,2,{time}\n")
    done = run_cli("load", "events", file, "--dry-run", *options, dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert ("times without a zone are read as UTC" in done.stdout) == is_told


def test_a_pipe_is_read_and_a_folder_is_called_one(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, b"user,item,ts\n1,2,2024-01-01\n")
        done = run_cli("load", "events", str(pipe), "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, "select user_id, item_id from events") == [(1, 2)]
    done = run_cli("load", "events", str(tmp_path), "--yes", dsn=empty_database)
    assert f"{tmp_path} is a folder" in done.stderr


def test_a_column_without_a_zone_holds_the_times_of_utc(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    times = ["2024-01-01 10:00:00", "2024-01-01T12:00:00+05:00", "1704103200"]
    file = write(tmp_path / "events.csv", "user,item,ts\n" + "".join(f"1,2,{time}\n" for time in times))
    options = ("--timezone", "Europe/Berlin", "--type", "occurred_at=timestamp", "--yes")
    done = run_cli("load", "events", file, *options, dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, "select occurred_at::text from events order by 1") == [
        ("2024-01-01 07:00:00",), ("2024-01-01 09:00:00",), ("2024-01-01 10:00:00",)
    ]  # fmt: skip


def test_numbers_that_are_no_times_are_said_to_be_none(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    file = write(tmp_path / "events.csv", "user,item,ts\n1,2,511\n1,3,1012\n")
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "no times, but bigint" in done.stdout
    assert "create a view of public.events whose occurred_at holds times" in done.stdout
    assert "create_model" not in done.stdout


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        (["510,14", "1.234,5", "-7"], ["numeric", "510.14", "1234.5", "-7"]),
        (["1.234", "2,5", "3"], ["numeric", "1234", "2.5", "3"]),
        # Thousands, as far as anybody can tell.
        (["1,234", "2,500", "3"], ["text", "1,234", "2,500", "3"]),
        (["1,234.50", "2,5", "3"], ["text", "1,234.50", "2,5", "3"]),
    ],
)
def test_decimal_commas_are_read_where_no_value_says_otherwise(
    empty_database: str, run_cli: RunCli, tmp_path: Path, prices: list[str], expected: list[str]
) -> None:
    lines = "".join(f"1;a{place};2010-01-0{place + 1};{price}\n" for place, price in enumerate(prices))
    file = write(tmp_path / "events.csv", "\ufeffuser;item;time;price\n" + lines)
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert ("decimal commas" in done.stdout) == (expected[0] == "numeric")
    found = rows(empty_database, "select pg_typeof(price)::text, price::text from events order by item_id")
    assert [found[0][0], *(row[1] for row in found)] == expected


def test_keys_that_look_like_numbers_stay_as_they_are_written(
    empty_database: str, run_cli: RunCli, tmp_path: Path
) -> None:
    file = write(tmp_path / "events.csv", "user,item,time\n2010-01-01,1.1,2010-01-01\n2010-01-02,1.10,2010-01-01\n")
    done = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert rows(empty_database, "select user_id, item_id from events order by 1") == [
        ("2010-01-01", "1.1"),
        ("2010-01-02", "1.10"),
    ]


@pytest.mark.parametrize(("encoding", "header"), [("latin-1", "user,Stück,time"), ("utf-16", "user,item,time")])
def test_a_header_of_another_encoding_is_refused_with_the_option(
    empty_database: str, run_cli: RunCli, tmp_path: Path, encoding: str, header: str
) -> None:
    file = write(tmp_path / "events.csv", f"{header}\n1,a,2010-01-01\n".encode(encoding))
    refused = run_cli("load", "events", file, "--yes", dsn=empty_database)
    assert refused.returncode == 1
    assert "the header of" in refused.stderr and "is not utf-8" in refused.stderr
    assert "--encoding latin-1" in refused.stderr
    options = ("--map", "item_id=Stück") if "Stück" in header else ()
    done = run_cli("load", "events", file, "--yes", "--encoding", encoding, *options, dsn=empty_database)
    assert done.returncode == 0, done.stderr


def test_a_table_in_the_way_is_added_to_or_exchanged_only_on_demand(
    empty_database: str, run_cli: RunCli, csv_file: str
) -> None:
    assert run_cli("load", "events", csv_file, "--yes", dsn=empty_database).returncode == 0
    again = run_cli("load", "events", csv_file, "--yes", dsn=empty_database)
    assert again.returncode == 1
    assert "--append" in again.stderr
    assert "--replace" in again.stderr
    read_only = {"PGOPTIONS": "-c default_transaction_read_only=on"}
    refused = run_cli("load", "events", csv_file, "--yes", "--append", dsn=empty_database, env=read_only)
    assert "hint: a standby is read-only: name its primary" in refused.stderr
    # A role may have types' names in quotes.
    quoted = {"PGOPTIONS": "-c quote_all_identifiers=on"}
    assert run_cli("load", "events", csv_file, "--yes", "--append", dsn=empty_database, env=quoted).returncode == 0
    assert len(rows(empty_database)) == 6
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create view in_use as select * from events")
    assert run_cli("load", "events", csv_file, "--yes", "--replace", dsn=empty_database).returncode == 0
    assert len(rows(empty_database, "select * from in_use")) == 3


@pytest.mark.parametrize(
    ("content", "options", "message", "remedy"),
    [
        ("", (), "is empty", "first line"),
        ("user_id,item_id,ts\n", (), "no rows", "right file"),
        ("a,b,c\n1,2,3\n", (), "known to be user_id", "--map user_id="),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--map", "user_id=nope"), "'nope'", "user_id, item_id, ts"),
        ("user_id,item_id,ts,ts\n1,a,b,c\n", (), "'ts' is there twice", "rename"),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--type", "item_id=money"), "type money", "bigint"),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--type", "nope=text"), "'nope'", "item_id"),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--table", "a.b.c"), "'a.b.c'", "public.events"),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--table", "pg_catalog.pg_class"), "exists already", "--append"),
        ("user_id,item_id,ts\n1,a,2024-01-01\n", ("--timezone", "Mars/Base"), "'Mars/Base'", "Europe/Berlin"),
        (gzip.compress(CSV.encode() + os.urandom(100_000))[:-50_000], (), "damaged", "fetch it again"),
        (b"PAR1 no parquet at all PAR1", (), "damaged", "fetch it again"),
        ('user_id,item_id,ts\n1,"a,2024-01-01\n' + "x" * 5_000_000, (), "line 2", "quote"),
    ],
)
def test_what_cannot_be_loaded_gets_a_message_and_a_remedy(
    empty_database: str,
    run_cli: RunCli,
    tmp_path: Path,
    content: str | bytes,
    options: tuple[str, ...],
    message: str,
    remedy: str,
) -> None:
    done = run_cli("load", "events", write(tmp_path / "file", content), "--yes", *options, dsn=empty_database)
    assert done.returncode == 1
    error, _, hint = done.stderr.partition("hint:")
    assert message in error
    assert remedy in hint
    assert "Traceback" not in done.stderr
    assert rows(empty_database, "select to_regclass('public.events')") == [(None,)]


def test_a_missing_file_is_named(empty_database: str, run_cli: RunCli) -> None:
    done = run_cli("load", "events", "nowhere.csv", "--yes", dsn=empty_database)
    assert done.returncode == 1
    assert "nowhere.csv does not exist" in done.stderr


def test_a_dry_run_changes_nothing(empty_database: str, run_cli: RunCli, csv_file: str) -> None:
    done = run_cli("load", "events", csv_file, "--dry-run", dsn=empty_database)
    assert done.returncode == 0
    assert "occurred_at" in done.stdout
    assert rows(empty_database, "select to_regclass('public.events')") == [(None,)]


def test_a_killed_load_leaves_the_old_table(empty_database: str, run_cli: RunCli, csv_file: str) -> None:
    assert run_cli("load", "events", csv_file, "--yes", dsn=empty_database).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "pgvae.cli", "load", "events", "-", "--yes", "--replace", "--dsn", empty_database],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(CSV.encode() + b"1,a,2024-01-01 00:00:00,1,1\n" * 200_000)
    process.stdin.flush()
    deadline = time.monotonic() + 30
    copying = "select 1 from pg_stat_activity where query like 'copy%' and datname = current_database()"
    while not rows(empty_database, copying) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows(empty_database, copying), "the load never came to its COPY"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    assert len(rows(empty_database)) == 3


def test_users_and_items_have_their_own_standard_columns(empty_database: str, run_cli: RunCli, tmp_path: Path) -> None:
    items = write(tmp_path / "items.csv", "SKU;Name;Category;UnitPrice\nA1;Teapot;Kitchen;9.95\n")
    users = write(tmp_path / "users.csv", "id,SignupDate,Country\n7,2024-02-03,France\n")
    assert run_cli("load", "items", items, "--yes", dsn=empty_database).returncode == 0
    assert run_cli("load", "users", users, "--yes", dsn=empty_database).returncode == 0
    assert [str(v) for v in rows(empty_database, "select item_id, title, category, price from items")[0]] == [
        *("A1", "Teapot", "Kitchen", "9.95")
    ]
    assert rows(empty_database, "select user_id, registered_at::text, country from users") == [
        (7, "2024-02-03", "France")
    ]


def test_who_may_not_create_schemas_loads_into_one_that_is_there(
    empty_database: str, run_cli: RunCli, csv_file: str, role: str
) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(f"create schema mine; grant usage on schema mine to {role}")
        refused = run_cli(
            "load", "events", csv_file, "--yes", "--table", "mine.events", dsn=as_role(empty_database, role)
        )
        assert refused.returncode == 1
        assert "grant create on schema mine" in refused.stderr
        connection.execute(f"grant create on schema mine to {role}")
        done = run_cli("load", "events", csv_file, "--yes", "--table", "mine.events", dsn=as_role(empty_database, role))
        assert done.returncode == 0, done.stderr
        connection.execute(f"drop owned by {role}")


def test_names_between_colons_are_no_pictures(empty_database: str, run_cli: RunCli) -> None:
    done = run_cli("load", "events", "-", "--dry-run", dsn=empty_database, input="a:x:b;c\n1;2\n")
    assert "there are: a:x:b, c" in done.stderr
