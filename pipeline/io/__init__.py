"""Files: atomic writes, locks, resumable stores, HDF5, and the operating system's errors."""
