"""What the environment tells of a job, without mpirun: how many processes there are, and how many cores for each."""
from __future__ import annotations

import os

import pytest

from ldm import device, parallel

JOB = ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE", "MS_WORKER_NUM", "MS_SCHED_HOST")


@pytest.fixture
def threads(monkeypatch):
    """Threads of a process whose environment, own cores and launcher's cores are these."""
    def of(variables: dict, own: int, launcher: int | None) -> int:
        def cores(process):
            if process and launcher is None:
                raise ProcessLookupError
            return range(launcher if process else own)

        for name in JOB:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(parallel, "adopt_open_mpi", lambda: None)
        monkeypatch.setattr(parallel, "_local_size", 1)
        monkeypatch.setattr(os, "sched_getaffinity", cores, raising=False)
        parallel.prepare_process()
        return parallel.job_threads()
    return of


@pytest.mark.parametrize("variables, own, launcher, expected", [
    ({}, 8, 8, 0),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"}, 8, 8, 0),  # four machines
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, 8, 8, 4),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMPI_COMM_WORLD_SIZE": "6"}, 8, 8, 2),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_SIZE": "8"}, 2, 2, 1),  # more processes than cores
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, 1, 8, 1),  # bound to a core each
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, 4, 8, 4),  # bound to a socket each
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}, 4, 8, 2),  # two of them on a socket
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, 8, None, 4),  # the launcher is gone
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "two", "OMPI_COMM_WORLD_SIZE": "2"}, 8, 8, 4),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "0"}, 8, 8, 0),
    ({"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1"}, 8, 8, 4),  # msrun
    ({"MS_WORKER_NUM": "16", "MS_SCHED_HOST": "192.168.0.7"}, 8, 8, 0),  # of several machines: nobody knows
])
def test_processes_of_a_job_share_the_cores(threads, variables, own, launcher, expected):
    assert threads(variables, own, launcher) == expected


@pytest.mark.parametrize("asked, shared, expected", [(0, 3, [3]), (5, 3, [5]), (0, 0, [])])
def test_threads_that_are_asked_for_come_first(monkeypatch, asked, shared, expected):
    seen = []
    monkeypatch.setattr(device, "job_threads", lambda: shared)
    monkeypatch.setattr(device.ms.device_context.cpu.op_tuning, "threads_num", seen.append)
    device.start_device("CPU", 1, asked)
    assert seen == expected


@pytest.mark.parametrize("variables, expected", [
    ({}, 1), ({"MS_WORKER_NUM": "3"}, 3), ({"OMPI_COMM_WORLD_SIZE": "2"}, 2), ({"MS_WORKER_NUM": "0"}, 1),
    ({"MS_WORKER_NUM": "x", "OMPI_COMM_WORLD_SIZE": "4"}, 4)])
def test_the_size_of_a_job(monkeypatch, variables, expected):
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.job_size() == expected
