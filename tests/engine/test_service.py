"""The engine's thread and its asynchronous readers."""

import asyncio
import threading
import time

import pytest

from perilune.engine import Engine, EngineService, Request, SamplingParams
from perilune.errors import EngineBusyError, EngineError


def request(prompt, k=1, **params):
    return Request(prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 12, **params}), num_samples=k)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def read(stream, delay_s=0.0):
    """Tokens and finish reason by sample."""
    found = {}
    try:
        async for chunk in stream:
            tokens, _ = found.get(chunk.sample, ((), None))
            found[chunk.sample] = tokens + chunk.tokens, chunk.finish_reason
            await asyncio.sleep(delay_s)
    finally:
        stream.cancel()  # as a server does when its client is gone
    return found


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


REQUESTS = [request([1, 2, 3], k=3, seed=1), request([4], seed=2, stop_ids=(5, 6)), request([7, 8], seed=3)]


def test_readers_get_what_generate_returns(model):
    expected = Engine(model).generate(REQUESTS)

    async def serve():
        async with EngineService(Engine(model)) as service:
            delays = zip(REQUESTS, (0, 0.01, 0), strict=True)
            found = await asyncio.gather(*(read(service.submit(request), delay) for request, delay in delays))
            assert service.stats().requests == 0
            return found

    found = [response[sample] for response in run(serve()) for sample in sorted(response)]
    for (tokens, reason), completion in zip(found, expected, strict=True):
        assert tuple(token.token_id for token in tokens) == completion.token_ids
        assert tuple(token.logprob for token in tokens) == pytest.approx(completion.logprobs, abs=1e-5)
        assert reason == completion.finish_reason


def test_a_reader_who_does_not_read_holds_nobody_up(model):
    async def serve():
        async with EngineService(Engine(model)) as service:
            idle = service.submit(request([1], max_new_tokens=50))
            await read(service.submit(request([2], max_new_tokens=60)))
            await until(lambda: service.stats().requests == 0)
            chunk = await anext(idle)
            assert len(chunk.tokens) == 50
            assert chunk.finish_reason == "length"

    run(serve())


def test_a_late_reader_is_told_when_the_engine_had_the_tokens(model):
    async def serve():
        async with EngineService(Engine(model)) as service:
            begun_s = time.monotonic()
            stream = service.submit(request([1], k=2, max_new_tokens=20))
            await until(lambda: service.stats().requests == 0)
            ended_s = time.monotonic()
            await until(lambda: time.monotonic() > ended_s + 0.02)
            chunks = [chunk async for chunk in stream]
            assert [len(chunk.tokens) for chunk in chunks] == [20, 20]
            for chunk in chunks:
                assert begun_s < chunk.first_s < chunk.last_s < ended_s

    run(serve())


def test_canceling_gives_everything_back(model):
    async def serve():
        engine = Engine(model, block_size=4)
        async with EngineService(engine) as service:
            streams = [service.submit(request([i], max_new_tokens=10**6)) for i in range(4)]
            await anext(streams[0])
            reader = asyncio.create_task(read(streams[1]))
            await asyncio.sleep(0.01)
            await until(lambda: service.stats().engine.running == 4)
            reader.cancel()
            for stream in (streams[0], streams[2], streams[3]):
                stream.cancel()
                stream.cancel()
            assert [chunk async for chunk in streams[2]] == []
            await until(lambda: service.stats().engine.running == 0 and service.stats().requests == 0)
            assert not engine.has_work
            assert engine.stats().pages_used == engine.stats().pages_cached

    run(serve())


def test_one_sample_is_canceled_and_others_are_read_to_their_end(model):
    wanted = request([1, 2], k=3, seed=4)
    expected = Engine(model).generate([wanted])

    async def serve():
        engine = Engine(model, max_batch=3)
        async with EngineService(engine, max_waiting=0) as service:
            stream = service.submit(request([1, 2], k=3, seed=4, max_new_tokens=10**6))
            await anext(stream)
            stream.cancel(1)
            stream.cancel(1)
            await until(lambda: service.stats().engine.running == 2)
            other = service.submit(request([5], max_new_tokens=2))  # there is room for one more
            assert len((await read(other))[0][0]) == 2
            stream.cancel(0)
            stream.cancel(2)  # the last
            assert [chunk async for chunk in stream] == []
            await until(lambda: service.stats().requests == 0 and not engine.has_work)
            stream = service.submit(wanted)
            stream.cancel(0)
            found = await read(stream)
            stream.cancel(2)
            await until(lambda: service.stats().requests == 0)
            return found

    found = run(serve())
    assert sorted(found) == [1, 2]
    for sample, (tokens, reason) in found.items():
        assert tuple(token.token_id for token in tokens) == expected[sample].token_ids
        assert reason == expected[sample].finish_reason


def test_the_last_sample_that_is_canceled_after_others_have_ended_ends_the_request(model):
    async def serve():
        engine = Engine(model)
        async with EngineService(engine) as service:
            stream = service.submit(request([1, 2], k=2, seed=4, max_new_tokens=5, stop_ids=()))
            await until(lambda: service.stats().requests == 0)
            stream.cancel(0)  # all have ended, none was read
            assert sorted(await read(stream)) == [1]
            assert not engine.has_work

    run(serve())


def test_more_than_may_wait_are_refused(model):
    async def serve():
        async with EngineService(Engine(model, max_batch=2), max_waiting=1) as service:
            streams = [service.submit(request([i], max_new_tokens=10**6)) for i in range(3)]
            with pytest.raises(EngineBusyError, match="3 responses are being written or wait"):
                service.submit(request([1]))
            streams[0].cancel()
            streams.append(service.submit(request([1], max_new_tokens=2)))
            for stream in streams[1:3]:
                stream.cancel()
            assert len((await read(streams[3]))[0][0]) == 2

    run(serve())


def test_a_group_larger_than_the_limit_is_served_when_alone(model):
    async def serve():
        async with EngineService(Engine(model, max_batch=2), max_waiting=0) as service:
            return await read(service.submit(request([1], k=5)))

    assert sorted(run(serve())) == [0, 1, 2, 3, 4]


def test_requests_that_come_together_are_served_together_or_not_at_all(model):
    async def serve():
        async with EngineService(Engine(model, max_batch=2), max_waiting=0) as service:
            streams = service.submit_all([request([1], k=2), request([2], k=3)])
            with pytest.raises(EngineBusyError, match=r"5 responses .* and 2 more were asked for; the engine takes 2"):
                service.submit_all([request([1]), request([2])])
            return [sorted(await read(stream)) for stream in streams]

    assert run(serve()) == [[0, 1], [0, 1, 2]]


def test_leaving_ends_open_responses_with_an_error(model):
    async def serve():
        async with EngineService(Engine(model)) as service:
            stream = service.submit(request([1], max_new_tokens=10**6))
            await anext(stream)
        with pytest.raises(EngineError, match="shut down before"):
            await read(stream)

    run(serve())
    assert not any(thread.name == "perilune-engine" for thread in threading.enumerate())


def test_a_failure_reaches_every_reader_and_the_stats(model, monkeypatch):
    async def serve():
        engine = Engine(model)
        async with EngineService(engine) as service:
            streams = [service.submit(request([i], max_new_tokens=10**6)) for i in range(2)]
            await anext(streams[0])

            def broken(*_, **__):
                raise RuntimeError("out of memory")

            monkeypatch.setattr(model, "hidden", broken)
            for stream in streams:
                with pytest.raises(EngineError, match="RuntimeError: out of memory"):
                    await read(stream)
            assert "out of memory" in service.stats().error
            with pytest.raises(EngineError, match="the engine has failed"):
                service.submit(request([1]))
            assert service.stats().requests == 0
            assert not engine.has_work

    run(serve())


def test_bad_requests_are_refused_at_once(model):
    async def serve():
        service = EngineService(Engine(model))
        with pytest.raises(EngineBusyError, match="not running"):
            service.submit(request([1]))
        async with service:
            with pytest.raises(EngineError, match="token id 99"):
                service.submit(request([99]))

    run(serve())
    with pytest.raises(EngineError, match="max_waiting must be >= 0"):
        EngineService(Engine(model), max_waiting=-1)
