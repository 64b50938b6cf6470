"""The measuring stick: networks beside their peers and beside their bare matrix products, timed in turn."""

from allmlp.benchmark.floor import record_products, replay
from allmlp.benchmark.measurement import FLOOR, MODELS, OURS, Result, Setting, check, machine, measure, settings
from allmlp.benchmark.networks import example
from allmlp.benchmark.peers import build_pair, checkouts, peers_of
from allmlp.benchmark.report import read_results, result_table, write_page, write_results

__all__ = [
    "FLOOR",
    "MODELS",
    "OURS",
    "Result",
    "Setting",
    "build_pair",
    "check",
    "checkouts",
    "example",
    "machine",
    "measure",
    "peers_of",
    "read_results",
    "record_products",
    "replay",
    "result_table",
    "settings",
    "write_page",
    "write_results",
]
