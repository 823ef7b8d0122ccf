"""Keep a job of many ranks going, or end it in one sentence: locks, signals, exit codes, a watchdog, stragglers,
checksums, and preflight checks."""
