"""Threads that wait for each other sleep, so that a stage does not slow down when other programs use the cores.

The threads of OpenMP, with which torch and scikit-learn compute, spin while they wait. If more threads want to run than
there are cores, a spinning thread takes the core that the thread it waits for needs.
"""

import os


def sleep_while_waiting() -> None:
    """Set this for libraries that are loaded later, unless the user's environment says otherwise."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the OpenMP standard; read when the library is loaded
