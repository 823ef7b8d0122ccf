"""Handle failures of multi-rank jobs: locks, signals, exit codes, watchdog, straggler detection, checksums, preflight
checks."""
