"""The upkeep of the course: working copies, notebooks built and run, the course model trained, lock, doctor, the test suite."""
