"""What runs inside PostgreSQL: pure Python and NumPy, CuPy where there is a GPU."""
