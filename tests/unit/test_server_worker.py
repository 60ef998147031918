"""The thread that owns a model: what it draws, what it drops, what it refuses, and how it dies."""

import asyncio
import time
from contextlib import closing

import pytest
import torch

from llama2.errors import UserError
from llama2.generate.engine import Engine
from llama2.generate.request import SampleRequest
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.serve.errors import ApiError
from llama2.serve.worker import Worker

LONG = Sampling(max_tokens=400)


@pytest.fixture(scope="module")
def engine():
    return Engine(Llama(LlamaConfig(96, 32, 48, 2, 2, 1, 512)).eval(), slots=2, precision="fp32")


@pytest.fixture
def worker(engine):
    worker = Worker("tiny", engine, waiting=2)
    worker.start()
    yield worker
    worker.stop()


def ask(sampling=LONG, index=0):
    return SampleRequest((1, 5, 9), sampling, index)


async def follow(stream):
    tokens = [[] for _ in stream.requests]
    async for deltas in stream.deltas():
        for delta in deltas:
            tokens[delta.sample] += [token for token, _, _ in delta.steps]

    return tokens


async def until(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


def test_what_it_draws_is_what_the_engine_draws(worker, engine):
    sampling = Sampling(max_tokens=30, seed=5)

    async def several():
        with closing(
            worker.submit([SampleRequest((1, 5, 9), sampling, 0, sample) for sample in range(3)])
        ) as stream:
            return await follow(stream)

    (expected,) = engine.generate([(1, 5, 9)], Sampling(max_tokens=30, seed=5, n=3))
    assert [tuple(row) for row in asyncio.run(several())] == [each.tokens for each in expected]
    assert worker.admitted == 0


def test_what_is_cancelled_leaves_its_slot(worker):
    async def one():
        with closing(worker.submit([ask()])) as stream:
            async for _ in stream.deltas():
                break

            assert worker.running == 1

        assert worker.admitted == 0
        await until(lambda: worker._session.running == 0)
        assert stream.requests[0].finish == "cancelled"
        assert len(stream.requests[0].tokens) < 400

    asyncio.run(one())


def test_the_queue_is_bounded(worker):
    async def crowd():
        with closing(worker.submit([ask(index=index) for index in range(4)])) as stream:
            assert (worker.running, worker.waiting) == (2, 2)
            with pytest.raises(ApiError) as refused:
                worker.submit([ask()])

            assert refused.value.status == 429
            assert int(refused.value.headers["Retry-After"]) >= 1
            with pytest.raises(ApiError):
                await worker.call(lambda: 1)

            stream.cancel(0)
            with closing(worker.submit([ask(Sampling(max_tokens=2))])) as late:
                for sample in (1, 2, 3):
                    stream.cancel(sample)

                assert len((await follow(late))[0]) == 2

        assert worker.admitted == 0

    asyncio.run(crowd())


def test_a_call_is_carried_out_between_steps(worker):
    async def both():
        with closing(worker.submit([ask(Sampling(max_tokens=50))])) as stream:
            found, _ = await asyncio.gather(worker.call(lambda: 6 * 7), follow(stream))

        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)

        return found

    assert asyncio.run(both()) == 42
    assert worker.alive


def test_time_is_limited(worker):
    async def slow():
        with closing(worker.submit([ask()], seconds=0.01)) as stream:
            await follow(stream)

    with pytest.raises(ApiError) as refused:
        asyncio.run(slow())

    assert refused.value.status == 408
    assert worker.admitted == 0


def test_a_death_is_told_to_everybody(worker, capsys):
    async def doomed():
        with (
            closing(worker.submit([ask(), ask(index=1)])) as stream,
            closing(worker.submit([ask(index=2)])) as other,
        ):
            async for _ in stream.deltas():
                break

            worker._session.step = lambda: 1 // 0
            for each in (stream, other):
                with pytest.raises(ApiError) as failed:
                    await follow(each)

                assert failed.value.status == 500

        assert not worker.alive
        assert worker.admitted == 0
        with pytest.raises(ApiError) as refused:
            worker.submit([ask()])

        assert refused.value.status == 503

    asyncio.run(doomed())
    heard = capsys.readouterr().err
    assert "ZeroDivisionError" in heard
    assert "the model 'tiny' has failed" in heard


def test_a_damaged_model_is_not_started():
    model = Llama(LlamaConfig(96, 32, 48, 2, 2, 1, 64)).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(UserError, match="not finite"):
        Worker("damaged", Engine(model, slots=2, precision="fp32")).start()
