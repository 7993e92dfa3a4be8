"""What ``tpfuse bench`` and ``benchmarks/`` share: ranks, contenders, timing, links, tuning. Nothing else imports it."""
