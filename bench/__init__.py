"""Speed of nbdimg beside its peers, measured with fio's nbd engine on Unix sockets.

`python -m bench` runs four parts and writes `bench/RESULTS.md` and `bench/results.json`:

* throughput: every cell of `cells.CELLS` on every server, page cache warm, in interleaved rounds;
* cold: does a page-cache miss on one connection stall a warm reader on another;
* fairness: 4 KiB latency beside a 4 MiB x 16 neighbour on another connection;
* profile: processor time, system calls and Python functions for each request.

`python -m bench.ceiling` puts a bare server in C beside them: how much of what is possible here is reached.

Imports go down only: `__main__` and `ceiling`; `session`, the four parts and `report`; `servers`, `fio`, `image`,
`process`, `environment`; `results` and `cells`.
"""
