"""Several hosts: what happens where they are not what a job needs; the tests themselves are in tests/hosts."""

from __future__ import annotations

from tests.support.robustness import Kind

START, TWO, LAUNCH = (f"tests/hosts/test_{name}.py" for name in ("start", "two_hosts", "launchers"))
KINDS = [
    Kind(
        section="Several hosts",
        name="stages, replicas and the backprop twin on two hosts",
        outcome="honoured",
        what="The weights, the evaluation and a resumed run are those of one host, bit for bit.",
        tests=(
            f"{TWO}::test_two_hosts_train_and_do_all_that_one_host_does",
            f"{TWO}::test_two_ranks_on_each_of_two_hosts",
            f"{LAUNCH}::test_by_deepspeed_with_a_host_file",
            f"{LAUNCH}::test_by_torchrun_on_four_stages_and_on_replicas",
            f"{LAUNCH}::test_as_a_job_of_slurm",
        ),
    ),
    Kind(
        section="Several hosts",
        name="clocks that differ, and caches of measured times on one host alone",
        outcome="honoured",
        what="Traces are on the clock of the first rank, and the partition is the same on all.",
        tests=(f"{TWO}::test_two_hosts_train_and_do_all_that_one_host_does",),
    ),
    Kind(
        section="Several hosts",
        name="no route to the first rank",
        outcome="refused",
        what="The host that has none is named, with `MASTER_ADDR`.",
        tests=(f"{START}::test_a_host_that_does_not_reach_the_first_one",),
    ),
    Kind(
        section="Several hosts",
        name="a wrong interface, or a firewall between the hosts",
        outcome="refused",
        what="All ranks name the hosts that do not reach each other, and `GLOO_SOCKET_IFNAME`.",
        tests=(
            f"{START}::test_a_host_whose_name_is_its_own_loopback_address",
            f"{START}::test_an_interface_that_is_not_there",
            f"{START}::test_a_firewall_that_passes_the_first_port_alone",
        ),
    ),
    Kind(
        section="Several hosts",
        name="other code on one host",
        outcome="refused",
        what="All ranks name the hosts and what differs.",
        tests=(f"{START}::test_hosts_with_different_code",),
    ),
    Kind(
        section="Several hosts",
        name="a folder of runs that the hosts do not share",
        outcome="refused",
        what="All ranks say so before training.",
        tests=(f"{START}::test_a_folder_of_runs_that_the_hosts_do_not_share",),
    ),
    Kind(
        section="Several hosts",
        name="an emulated `link` between hosts",
        outcome="refused",
        what="It needs one clock; all ranks name the hosts.",
        tests=(f"{TWO}::test_an_emulated_link_between_hosts_is_refused",),
    ),
]
