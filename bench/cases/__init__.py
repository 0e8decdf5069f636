"""The measurements, one module for each row or family of rows; each has a `run(quick) -> rows`."""
