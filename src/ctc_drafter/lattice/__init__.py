"""The mathematics of alignment: pure tensor functions, no model, no I/O. Each has a brute-force twin in tests."""
