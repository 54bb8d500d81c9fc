"""Which process this is, from the variables of torchrun and srun; where the processes of a slurm job meet."""

from __future__ import annotations

import pytest

from collie_core.config.checks import processes
from collie_core.errors import UserError
from collie_core.launch import World, current_world
from collie_core.launch.slurm import expand, first_host, job_port
from collie_core.launch.world import rendezvous

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "127.0.0.[1-3]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}


def test_one_process_without_a_launcher() -> None:
    assert current_world({}) == World(0, 1, 0, 1, "none")


def test_torchrun() -> None:
    environ = {**TORCHRUN, "MASTER_ADDR": "node07", "MASTER_PORT": "1234"}
    world = current_world(environ)
    assert world == World(3, 4, 1, 2, "torchrun")
    assert rendezvous(world, environ) == ("node07", 1234)


def test_srun() -> None:
    world = current_world(STEP)
    assert world == World(4, 5, 0, 1, "slurm")
    assert rendezvous(world, STEP) == ("127.0.0.1", job_port(STEP))
    assert rendezvous(world, {**STEP, "MASTER_ADDR": "b", "MASTER_PORT": "9"}) == ("b", 9)


def test_torchrun_within_a_step_is_heard_first() -> None:
    assert current_world({**STEP, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    "batch",
    [
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in the batch script itself
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # an interactive shell
    ],
)
def test_a_shell_in_a_job_is_one_process(batch: dict[str, str]) -> None:
    assert current_world(batch).launcher == "none"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "4"}, "RANK 4 is not below WORLD_SIZE 4"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is not below LOCAL_WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK 1 of LOCAL_WORLD_SIZE 8 contradicts RANK 3 of WORLD_SIZE 4"),
    ],
)
def test_variables_that_contradict_are_refused(change: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        current_world({**TORCHRUN, **change})


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is missing"):
        current_world({"RANK": "0", "WORLD_SIZE": "2"})


def test_the_config_is_checked_against_this_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes() == 1
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert processes() == 4


LISTS = {
    "node01": ["node01"],
    "gpu[1-3,07],login": ["gpu1", "gpu2", "gpu3", "gpu07", "login"],
    "a[1-2]b[3-4]": ["a1b3", "a1b4", "a2b3", "a2b4"],
    "n[008-011]": ["n008", "n009", "n010", "n011"],
    "rack1-n[2-3]-ib,x-y": ["rack1-n2-ib", "rack1-n3-ib", "x-y"],
}


@pytest.mark.parametrize("text", LISTS)
def test_node_lists(text: str) -> None:
    assert list(expand(text)) == LISTS[text]


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[1-2]]", "n[1 2]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        list(expand(text))


def test_the_first_host_is_not_the_login_node() -> None:
    assert first_host(STEP) == "127.0.0.1"


def test_jobs_and_steps_beside_each_other_have_ports_of_their_own() -> None:
    ports = {
        job_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(41_000, 42_000)
        for step in range(8)
    }
    assert len(ports) == 8000 and all(20_000 <= port < 32_768 for port in ports)
