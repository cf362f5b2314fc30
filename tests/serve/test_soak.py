"""A server with four times what it can do, bad guests and changing weights: nothing that it accepted is lost.

The short form looks at what must hold on any machine. The long one, for minutes, also at memory and times, and prints
what docs/serve.md says.
"""

import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.attack.scale import scaled
from tests.serve.conftest import RunningServer
from tests.serve.soaking import Crowd, Groups, Seen, Trainer, bad_guests, repeated
from vhead import Scorer
from vhead.demo import demo_model_path

SECONDS = scaled(0, 300)
# At least this long in the short form, too.
QUIET_S, OVERLOAD_S = (10.0, float(SECONDS)) if SECONDS else (0.3, 1.0)
QUEUE, CLIENTS, MANY = 32, 24, 96
# Tokens of a batch, and the most requests that it has room for: each has 80 tokens beside a prompt of 24 to share.
BATCH_TOKENS, BATCH = 2048, 25
# After so many seconds without the load, the speed is the one before.
RECOVERY_S = 2.0
RELOADS_S = 2.0 if SECONDS else 0.5


@pytest.fixture(scope="module")
def groups():
    return Groups(Scorer.from_pretrained(demo_model_path(), device="cpu", batch_invariant=True))


@pytest.fixture
def trainer(tmp_path, groups):
    made = Trainer(tmp_path / "published", groups)
    made.publish()
    made.publish()
    return made


def test_a_server_with_too_much_to_do_loses_nothing_that_it_has_accepted(tmp_path, groups, trainer):
    server = RunningServer(
        tmp_path / "log", "--batch-invariant", "--max-num-queued-reqs", str(QUEUE), "--max-num-batched-tokens",
        str(BATCH_TOKENS), "--body-timeout", "10", "--follow", str(tmp_path / "published"),
    )  # fmt: skip
    for body in groups.bodies:
        assert server.post("/score", body).status == 200, "before the clock starts, the model is warm"
    began = time.monotonic()
    before = asked(server, groups, "before")
    quiet = rate(before, began, QUIET_S)
    crowd = Crowd(server.port, "overload", groups, rate=4 * quiet if SECONDS else None)
    sizes: list[int] = []
    works = [lambda: sizes.append(memory(server)), lambda: asked_about(server)]
    loaded = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(repeated(bad_guests(server.port, groups.bodies[0]), 0.05))
        stack.enter_context(repeated([lambda: trainer.disturb(server)], RELOADS_S))
        stack.enter_context(repeated(works, 0.5))
        stack.enter_context(crowd.asking(MANY if SECONDS else CLIENTS))
        time.sleep(OVERLOAD_S)
    recovered = time.monotonic() + RECOVERY_S
    after = asked(server, groups, "after", (RECOVERY_S if SECONDS else 0) + QUIET_S)

    last = Crowd(server.port, "last", groups)
    with last.asking(CLIENTS):
        time.sleep(0.3)
        told = time.monotonic()
        code = server.stop()
        ended = time.monotonic()
    assert code == 0
    crowds = (before, crowd, after, last)
    check_answers(server, groups, [seen for each in crowds for seen in each.seen])
    for each in (before, after):
        assert {seen.status for seen in each.seen} == {200}
    if SECONDS:
        answered = sum(seen.status == 200 and seen.done > told for seen in last.seen)
        say(f"SIGTERM: {answered} accepted and answered after it, none lost; it ended in {ended - told:.1f} s")
        check_figures(quiet, crowd, rate(crowd, loaded, OVERLOAD_S), rate(after, recovered, QUIET_S), sizes)


def asked(server: RunningServer, groups: Groups, name: str, seconds: float = QUIET_S) -> Crowd:
    """What as many clients as the queue has room for see."""
    crowd = Crowd(server.port, name, groups)
    with crowd.asking(CLIENTS):
        time.sleep(seconds)
    return crowd


def asked_about(server: RunningServer) -> None:
    """Under any load, the server says how it is."""
    assert server.ask("GET", "/health").status == 200
    assert server.ask("GET", "/metrics").status == 200


def check_answers(server: RunningServer, groups: Groups, seen: list[Seen]) -> None:
    """What was accepted was answered with the right bits, and what was not is an honest refusal."""
    log = server.log.read_text()
    assert "every accepted request was answered" in log
    assert "Traceback" not in log
    lines = [line for line in server.lines() if "request_id" in line]
    logged = {line["request_id"]: line["status"] for line in lines}
    assert len(logged) == len(lines), "a request is in the log twice"
    assert len(seen) == len({one.name for one in seen}) > 0
    for one in seen:
        # Without an answer, the connection had ended before the server had the request.
        assert one.status == logged.get(one.name), one
        assert one.status in (200, 503, None), one
        assert one.status != 200 or groups.are_right(one), one


def rate(crowd: Crowd, since: float, seconds: float) -> float:
    """Answers a second in so many seconds."""
    return sum(seen.status == 200 and since <= seen.done < since + seconds for seen in crowd.seen) / seconds


def say(figures: str) -> None:
    """Prints what docs/serve.md says; `make soak` shows it."""
    sys.stdout.write(f"{figures}\n")


def percentile_99(rising: Sequence[float]) -> float:
    return rising[int(0.99 * len(rising))]


def memory(server: RunningServer) -> int:
    """The server's resident bytes; 0 where the system does not say."""
    status = Path(f"/proc/{server.process.pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def check_figures(before: float, crowd: Crowd, throughput: float, after: float, sizes: list[int]) -> None:
    """Memory is flat, nobody waits longer than the queue is, and the speed comes back."""
    answered = [one for one in crowd.seen if one.status == 200]
    times = sorted(one.seconds for one in answered)
    # Time is counted in answers, so that the bound holds by the speed that the server has while a request waits.
    clock = sorted(one.done for one in answered)
    waited = sorted(bisect_right(clock, one.done) - bisect_right(clock, one.done - one.seconds) for one in answered)
    longest = percentile_99(waited)
    # Those before it in the queue, those that are being computed when it comes, and its own batch.
    bound = QUEUE + 2 * BATCH
    quarter = len(sizes) // 4
    early, late = (statistics.median(each) for each in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
    refused = sum(one.status == 503 for one in crowd.seen)
    say(
        f"{OVERLOAD_S:g} s: {len(times)} accepted and answered, {refused} refused; {crowd.rate:.0f} requests a second "
        f"were to come, {len(crowd.seen) / OVERLOAD_S:.0f} did\n"
        f"answers a second: {before:.1f} before, {throughput:.1f} meanwhile, {after:.1f} from {RECOVERY_S:g} s after\n"
        f"seconds: median {statistics.median(times):.2f}, p99 {percentile_99(times):.2f}\n"
        f"answers from a request to its own: p99 {longest}, at most {bound} allowed\n"
        f"resident memory: {early / 2**20:.0f} MiB in the second quarter, {late / 2**20:.0f} MiB in the last"
    )
    assert late <= 1.05 * early
    assert longest <= bound
    assert after >= 0.9 * before
