"""What COPY gives as an array is what the query gives."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest
from psycopg import sql

from pgvae.binary_copy import copy_rows


# Around what is joined at once: the trailer comes alone, or the last row does.
@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537])
def test_every_row_is_read_once(shared: psycopg.Connection, count: int) -> None:
    query = sql.SQL("select n, (n % 7)::smallint, -n / 2.0::float8 from generate_series(1, {}) n").format(count)
    rows = copy_rows(shared, query, {"number": "i4", "rest": "i2", "half": "f8"})
    number = np.arange(1, count + 1)
    np.testing.assert_array_equal(rows["number"], number)
    np.testing.assert_array_equal(rows["rest"], number % 7)
    np.testing.assert_array_equal(rows["half"], -number / 2)
