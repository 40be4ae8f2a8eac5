"""What is done in the background is done in order, its errors are seen, and nothing waits for ever."""

import threading
import time
from collections.abc import Callable

import pytest

from pipeline.cache.writer import Background


def within(seconds: float, work: Callable[[], None]) -> list[BaseException]:
    """Its error, if there is one; fails if it takes longer."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return errors


def fails() -> None:
    raise OSError("disk full")


def test_work_is_done_in_order_by_another_thread_and_all_of_it_when_the_block_is_left():
    done, threads = [], set()

    def work() -> None:
        with Background() as background:
            for number in range(20):
                background.do(lambda number=number: (time.sleep(0.001), threads.add(threading.get_ident()), done.append(number)))

    assert within(10, work) == []
    assert done == list(range(20))
    assert len(threads) == 1


def test_the_caller_goes_on_while_work_is_done_but_no_further_ahead_than_asked():
    begun, allowed = [], threading.Semaphore(0)
    with Background(ahead=1) as background:
        for number in range(2):  # one at work, one waiting
            background.do(lambda number=number: (begun.append(number), allowed.acquire(timeout=5)))
        time.sleep(0.05)
        assert begun == [0]
        third = threading.Thread(target=background.do, args=(lambda: begun.append(2),))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        allowed.release(2)
        third.join(5)
        assert not third.is_alive()
    assert begun == [0, 1, 2]


def test_an_error_is_raised_at_the_next_check_and_at_the_next_do():
    for then in (lambda background: background.check(), lambda background: background.do(lambda: None)):
        reached = []

        def work(then=then, reached=reached) -> None:
            with Background() as background:
                background.do(fails)
                while background._error is None:
                    time.sleep(0.001)
                then(background)
                reached.append("not here")

        [error] = within(10, work)
        assert isinstance(error, OSError)
        assert str(error) == "disk full"
        assert reached == []


def test_an_error_of_the_last_work_is_raised_when_the_block_is_left():
    def work() -> None:
        with Background() as background:
            background.do(lambda: time.sleep(0.05))
            background.do(fails)

    assert [str(error) for error in within(10, work)] == ["disk full"]


def test_what_waits_after_an_error_is_dropped():
    done, gate = [], threading.Event()

    def work() -> None:
        with Background(ahead=3) as background:
            background.do(lambda: (gate.wait(5), fails()))
            background.do(lambda: done.append(1))
            background.do(lambda: done.append(2))
            gate.set()

    assert [str(error) for error in within(10, work)] == ["disk full"]
    assert done == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_waits_for_ever_when_work_fails_while_the_queue_is_full(error: BaseException):
    def raises() -> None:
        time.sleep(0.02)
        raise error

    def work() -> None:
        with Background(ahead=1) as background:
            background.do(raises)
            for _ in range(50):
                background.do(lambda: time.sleep(0.001))

    assert within(10, work) == [error]


def test_an_exception_in_the_block_is_not_masked_and_what_waited_is_done():
    done = []

    def work() -> None:
        with Background() as background:
            background.do(lambda: (time.sleep(0.02), done.append(1)))
            raise ValueError("the teacher")

    assert [str(error) for error in within(10, work)] == ["the teacher"]
    assert done == [1]


def test_an_exception_in_the_block_is_not_masked_by_one_in_the_background():
    def work() -> None:
        with Background() as background:
            background.do(fails)
            raise ValueError("the teacher")

    assert [str(error) for error in within(10, work)] == ["the teacher"]


def test_no_thread_is_left():
    before = threading.active_count()
    for body in (lambda background: None, lambda background: background.do(fails)):

        def work(body=body) -> None:
            with Background() as background:
                body(background)

        within(10, work)
    assert threading.active_count() == before
