"""A gateway's link and a worker's server, over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rpc_ends import LOAD, SECRET, Gateway, Proxy, hello, request, run, status_of, until, worker

from baton.errors import ConfigError, InvalidRequest, WorkerLost
from baton.rpc import client, server
from baton.rpc.auth import credentials
from baton.rpc.channel import STREAM_METHOD, connect
from baton.rpc.messages import (
    PROTOCOL_VERSION,
    Instructions,
    Open,
    StepReport,
    decode_to_gateway,
    encode,
)

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def test_hello_reports_in_order_and_acknowledged(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            assert gateway.hellos == [hello()]
            assert handler.events == [("opened", "gw", 1, False)]
            for step in range(300):
                srv.report("gw", load=LOAD, counters={"step": step})
                if step % 50 == 0:
                    await asyncio.sleep(0.001)
            await until(lambda: len(gateway.reports) == 300)
            assert [r.index for r in gateway.reports] == list(range(1, 301))
            assert [r.counters["step"] for r in gateway.reports] == list(range(300))
            # The lazy acknowledgement: without any instruction of its own, the gateway told
            # that it had at least all but the last ACK_EVERY.
            await until(lambda: handler.messages and handler.messages[-1].ack >= 256)
            assert len(srv._peers["gw"].outbox) <= client.ACK_EVERY
            await gateway.link.close()
            await until(lambda: ("lost", "gw") in handler.events)
            assert gateway.losses == []

    run(main())


def test_one_message_a_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker("127.0.0.1:0") as (_, handler, address):
            assert not address.endswith(":0")
            gateway = Gateway(address)
            for i in range(50):
                gateway.link.submit(request(f"r{i}"))
            gateway.link.abort("r3", 0, 1)
            gateway.link.proceed("r4", 0, 2)
            gateway.link.renew("g1")
            gateway.link.renew("g1")
            gateway.link.release("g2")
            gateway.link.drain()
            await until(lambda: handler.messages)
            assert handler.submitted() == [f"r{i}" for i in range(50)]
            first = handler.messages[0]
            assert [a.request_id for a in first.abort] == ["r3"]
            assert first.proceed == (("r4", 0, 2),)
            assert (first.renew, first.release, first.drain) == (("g1",), ("g2",), True)
            gateway.link.submit(request("later"))
            await until(lambda: len(handler.messages) == 2)
            assert (handler.messages[1].drain, handler.messages[1].proceed) == (False, ())
            await gateway.link.close()

    run(main())


def test_large_batches_are_split_and_too_large_requests_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_REQUEST_TOKENS", 1000)

    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address):
            gateway = Gateway(address)
            for i in range(10):
                gateway.link.submit(request(f"r{i}", 400))
            with pytest.raises(InvalidRequest):
                gateway.link.submit(request("big", 1001))
            await until(lambda: len(handler.submitted()) == 10)
            assert [len(m.submit) for m in handler.messages] == [2, 2, 2, 2, 2]
            await gateway.link.close()

    run(main())


def test_cut_streams_resume_without_loss_or_repeat(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            worker(f"unix:{tmp_path}/w") as (srv, handler, _),
            Proxy(tmp_path / "p", tmp_path / "w") as proxy,
        ):
            gateway = Gateway(proxy.address)
            await until(lambda: gateway.hellos)

            async def chatter() -> None:
                for i in range(600):
                    srv.report("gw", load=LOAD, counters={"step": i})
                    gateway.link.submit(request(f"r{i}"))
                    await asyncio.sleep(0.001)

            async def cutter() -> None:
                for _ in range(3):
                    await asyncio.sleep(0.15)
                    proxy.flowing.clear()  # let messages pile up on the way, then lose them
                    await asyncio.sleep(0.02)
                    await proxy.cut()
                    proxy.flowing.set()

            await asyncio.gather(chatter(), cutter())
            await until(lambda: len(gateway.reports) >= 600 and len(handler.submitted()) >= 600)
            assert proxy.num_connections == 4
            assert [r.counters["step"] for r in gateway.reports] == list(range(600))
            assert handler.submitted() == [f"r{i}" for i in range(600)]
            assert handler.events == [
                ("opened", "gw", 1, False),
                *[("lost", "gw"), ("opened", "gw", 1, True)] * 3,
            ]
            assert gateway.losses == []
            assert len(gateway.hellos) == 1
            await gateway.link.close()

    run(main())


def test_new_epoch_and_fresh_link_forget_the_old(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            for epoch in (1, 2, 2):
                gateway = Gateway(address, epoch)
                await until(lambda: gateway.hellos)  # noqa: B023
                srv.report("gw", load=LOAD)
                await until(lambda: gateway.reports)  # noqa: B023
                assert [r.index for r in gateway.reports] == [1]
                gateway.link._task.cancel()  # no goodbye
                await asyncio.gather(gateway.link._task, return_exceptions=True)
            await until(lambda: handler.events.count(("lost", "gw")) == 3)
            assert handler.events == [
                ("opened", "gw", 1, False), ("lost", "gw"), ("forgotten", "gw"),
                ("opened", "gw", 2, False), ("lost", "gw"), ("forgotten", "gw"),
                ("opened", "gw", 2, False), ("lost", "gw"),
            ]  # fmt: skip

    run(main())


def test_second_stream_replaces_the_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address):
            old = Gateway(address, 1)
            await until(lambda: old.hellos)
            new = Gateway(address, 2)
            await until(lambda: new.hellos and old.losses)
            assert "ABORTED" in old.losses[0]
            assert handler.events == [
                ("opened", "gw", 1, False), ("lost", "gw"), ("forgotten", "gw"),
                ("opened", "gw", 2, False),
            ]  # fmt: skip
            with pytest.raises(WorkerLost):
                old.link.submit(request("r"))
            await new.link.close()

    run(main())


def test_a_gateway_that_stays_away_is_forgotten_and_cannot_resume(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w", resume_window_s=0.05) as (srv, handler, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            await gateway.link.close()
            await until(lambda: ("forgotten", "gw") in handler.events)
            assert srv.gateways() == []
            srv.report("gw", load=LOAD)  # nobody's: dropped without an error
            code, details = await status_of(address, encode(Open("gw", 1, 0, resume=True)))
            assert (code, "nothing to resume" in details) == (PRECONDITION, True)
            assert handler.events[-1] == ("forgotten", "gw")

    run(main())


def test_reports_overflow_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNACKED_REPORTS", 100)

    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            for _ in range(150):
                srv.report("gw", load=LOAD)
            assert len(handler.events) == 1  # not called from within report()
            await until(lambda: gateway.losses)
            assert "RESOURCE_EXHAUSTED" in gateway.losses[0]
            assert handler.events[1:] == [("lost", "gw"), ("forgotten", "gw")]
            assert srv.gateways() == []
            again = Gateway(address)  # a fresh start is welcome
            await until(lambda: again.hellos)
            await again.link.close()

    run(main())


def test_stop_sends_what_is_queued_then_ends_the_link(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            gateway = Gateway(address)

            def on_report(report: StepReport) -> None:  # it writes while the worker ends
                gateway.reports.append(report)
                gateway.link.renew(f"g{report.index}")

            gateway.link._on_report = on_report
            await until(lambda: gateway.hellos)
            for _ in range(500):
                srv.report("gw", load=LOAD)
            loop = asyncio.get_running_loop()
            started = loop.time()
            await srv.stop(60.0)
            assert loop.time() - started < 15.0
            await until(lambda: gateway.losses)
            assert len(gateway.reports) == 500
            assert gateway.losses == ["the worker stopped"]
            assert handler.events[-1] == ("lost", "gw")

    run(main())


def test_stop_does_not_wait_for_a_gateway_that_does_not_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            worker(f"unix:{tmp_path}/w") as (srv, _, _),
            Proxy(tmp_path / "p", tmp_path / "w") as proxy,
        ):
            gateway = Gateway(proxy.address)
            await until(lambda: gateway.hellos)
            proxy.flowing.clear()
            for _ in range(2000):
                srv.report("gw", load=LOAD, counters={"c" * 5000: 1.0})
            loop = asyncio.get_running_loop()
            started = loop.time()
            await srv.stop(0.3)
            assert 0.2 < loop.time() - started < 15.0
            await gateway.link.close()
            assert len(gateway.reports) < 2000

    run(main())


def test_repeated_reports_are_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, _, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            for _ in range(10):
                srv.report("gw", load=LOAD)
            await until(lambda: len(gateway.reports) == 10)
            stream = srv._peers["gw"].stream
            assert stream is not None
            stream.sent = 4  # a writer that lost count
            srv.report("gw", load=LOAD)
            await until(lambda: stream.sent == 11)
            await until(lambda: len(gateway.reports) == 11)
            assert [r.index for r in gateway.reports] == list(range(1, 12))
            await gateway.link.close()

    run(main())


@pytest.mark.parametrize("gap", ["report", "instructions", "ack"])
def test_a_gap_ends_the_link(tmp_path: Path, gap: str) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            if gap == "report":
                srv._peers["gw"].outbox.append(encode(StepReport(index=3, load=LOAD)))
                srv.report("gw", load=LOAD)
            elif gap == "instructions":
                gateway.link._outbox.append(encode(Instructions(index=2)))
                gateway.link.drain()
            else:
                gateway.link._outbox.append(encode(Instructions(index=1, ack=9)))
                gateway.link.drain()
            await until(lambda: gateway.losses)
            expected = {"report": "report 3 follows 0", "instructions": "DATA_LOSS",
                        "ack": "never sent"}  # fmt: skip
            assert expected[gap] in gateway.losses[0]
            assert handler.messages == [] and gateway.reports == []

    run(main())


def test_a_failing_callback_loses_the_link_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, _, address):
            gateway = Gateway(address)
            gateway.link._on_report = lambda report: [][1]
            await until(lambda: gateway.hellos)
            srv.report("gw", load=LOAD)
            srv.report("gw", load=LOAD)
            await until(lambda: gateway.losses)
            await asyncio.sleep(0.05)
            assert gateway.losses == ["internal error of the gateway"]

    run(main())
    assert "IndexError" in caplog.text


@pytest.mark.parametrize("address", ["unix:{}/nobody", "127.0.0.1:1"])
def test_no_worker_there_is_lost_at_once(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        client, "RESUME_S", 60.0
    )  # a link that was there is tried again for so long

    async def main() -> None:
        gateway = Gateway(address.format(tmp_path))
        await until(lambda: gateway.losses)
        assert "UNAVAILABLE" in gateway.losses[0]
        await gateway.link.close()
        assert len(gateway.losses) == 1

    run(main())


def test_address_in_use_is_a_config_error() -> None:
    async def main() -> None:
        async with worker("127.0.0.1:0") as (_, _, address):
            with pytest.raises(ConfigError, match=address):
                async with worker(address):
                    pass

    run(main())


def test_health_service(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, _, address), connect(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for serving, expected in ((None, 2), (True, 1), (False, 2)):
                if serving is not None:
                    await srv.set_serving(serving)
                for name in ("", "baton.Worker"):
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                    assert reply.status == expected

    run(main())


def test_other_protocol_versions_are_refused_by_both(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, handler, address):
            code, details = await status_of(address, encode(Open("gw", 1, protocol=99)))
            assert code == PRECONDITION
            assert f"protocol {PROTOCOL_VERSION}, the peer 99" in details
            assert handler.events == []
            srv._hello_factory = lambda: msgspec.structs.replace(hello(), protocol=99)
            gateway = Gateway(address)
            await until(lambda: gateway.losses)
            assert "protocol 99" in gateway.losses[0]
            assert gateway.hellos == []

    run(main())


def test_resumed_hello_tells_what_was_acted_upon(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address), connect(address) as chan:
            for resume, last_index in ((False, 0), (True, 1)):
                call = chan.stream_stream(STREAM_METHOD)(metadata=credentials(SECRET))
                await call.write(encode(Open("gw", 1, resume=resume)))
                assert decode_to_gateway(await call.read()).last_index == last_index
                await call.write(encode(Instructions(index=1, drain=True)))
                await until(lambda: handler.messages)
                if resume:  # the first came again: dropped, and the next one is welcome
                    await call.write(encode(Instructions(index=2, drain=True)))
                    await until(lambda: len(handler.messages) == 2)
                call.cancel()
                await until(lambda: handler.events[-1] == ("lost", "gw"))
            assert [message.index for message in handler.messages] == [1, 2]

    run(main())


def test_connections_that_take_long_to_fail_are_no_reason_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a host is gone: each try takes a while, and none has come about."""
    monkeypatch.setattr(client, "RESUME_S", 1.0)
    monkeypatch.setattr(client, "STEADY_S", 0.2)
    num_tries = 0

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_tries
        num_tries += 1
        await asyncio.sleep(0.4)
        writer.transport.abort()

    async def main() -> None:
        async with await asyncio.start_unix_server(accept, tmp_path / "w"):
            gateway = Gateway(f"unix:{tmp_path}/w")
            await until(lambda: gateway.losses)
            assert "UNAVAILABLE" in gateway.losses[0]
            assert 2 <= num_tries <= 8

    run(main())
