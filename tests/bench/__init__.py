"""Tests of the benchmark's arithmetic, verdicts and parsers: no server and no fio runs here."""
