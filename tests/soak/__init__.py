"""`make soak MINUTES=30`: writers, random faults and handlers, and afterwards the reckoning.

`run` leads: on a `stage` (servers, proxies, processes) `writers` commit, `faults` strike,
`witnesses` note in a `ledger` what was committed, enqueued and handled, `check` compares, `report`
prints. For ordered handlers `calls` judges their order, `lane_watch` looks for lanes that stand
still, and `effects` counts those of `once=`.
"""
