"""Deployments: what is served is what was uploaded last, and nothing of a failed or cut-off upload stays."""

import asyncio
import errno
import io
import tarfile

import pytest
from running_control import until

from blockyard_api.bundles import deploy
from blockyard_api.errors import OutOfSpace


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


APP = {"app.R": "shinyApp(1, 2)"}


async def stream(*chunks):
    for chunk in chunks:
        yield chunk


async def cut_off(chunk):
    yield chunk
    raise ConnectionResetError


async def upload(control, app, files=None):
    body = stream(archive(files or APP))
    return await control.services.deployments.receive(app, body, None, "admin")


async def over(control, task_id):
    async for _ in control.services.deployments.follow(task_id):
        pass
    return await control.services.deployments.task(task_id)


@pytest.fixture
async def app(control):
    return await control.catalog.create("plain", "admin")


async def test_the_later_of_two_uploads_is_served_however_long_the_earlier_one_takes(control, app, monkeypatch):
    go_on = asyncio.Event()
    unpack = deploy.unpack

    async def slow_at_first(archive, destination):
        if destination.name == large:
            await go_on.wait()
        return await unpack(archive, destination)

    monkeypatch.setattr(deploy, "unpack", slow_at_first)
    large, first = await upload(control, app)
    small, second = await upload(control, app)
    assert (await over(control, second)).status == "completed"
    assert control.catalog.get(app.id).active_bundle == small
    go_on.set()
    overtaken = await over(control, first)
    assert overtaken.status == "completed"
    assert "later upload" in overtaken.log
    assert control.catalog.get(app.id).active_bundle == small
    assert (await control.services.deployments.rollback(app, large)).active_bundle == large


async def test_many_uploads_at_once_are_unpacked_a_few_at_a_time(control, app, monkeypatch):
    unpacking = most = 0
    unpack = deploy.unpack

    async def counted(*arguments):
        nonlocal unpacking, most
        unpacking += 1
        most = max(most, unpacking)
        try:
            return await unpack(*arguments)
        finally:
            unpacking -= 1

    monkeypatch.setattr(deploy, "unpack", counted)
    uploads = [await upload(control, app) for _ in range(8)]
    assert {(await over(control, task)).status for _, task in uploads} == {"completed"}
    assert 1 <= most <= 4
    assert control.catalog.get(app.id).active_bundle == uploads[-1][0]


async def test_an_upload_that_is_cut_off_leaves_nothing(control, app):
    with pytest.raises(ConnectionResetError):
        await control.services.deployments.receive(app, cut_off(b"\x1f\x8b"), None, "admin")
    assert not list((control.state / "uploads").iterdir())
    assert await control.services.deployments.list(app) == []


async def test_an_app_deleted_during_its_deployment_fails_it_and_leaves_nothing(control, app):
    _, task = await upload(control, app)
    await control.catalog.delete(app)
    told = await over(control, task)
    assert told.status == "failed"
    assert told.log.endswith("The app was deleted meanwhile; nothing was deployed.\n")
    assert not list((control.state / "bundles").iterdir())
    assert control.alive


async def test_a_database_that_fails_during_a_deployment_does_not_end_the_daemon(control, app):
    await upload(control, app)
    async with control.services.database.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE bundles RENAME TO elsewhere")
    await asyncio.wait(control.services.deployments.running())
    assert control.alive
    assert not list((control.state / "uploads").iterdir())


async def test_what_fails_after_a_bundle_is_served_takes_nothing_from_it(control, app, monkeypatch):
    async def full(_app_id):
        raise OutOfSpace("disk_full", "The server's disk is full.")

    monkeypatch.setattr(control.services.deployments, "_prune", full)
    bundle, task = await upload(control, app)
    told = await over(control, task)
    assert control.catalog.get(app.id).active_bundle == bundle
    assert (control.state / "bundles" / bundle / "app.R").exists()
    assert [each.status for each in await control.services.deployments.list(app)] == ["ready"]
    assert told.status == "completed"
    assert "failed" in told.log


async def test_the_daemon_ends_without_waiting_for_a_deployment_which_is_told_as_failed(start):
    control = await start()
    app = await control.catalog.create("plain", "admin")
    bundle, task = await upload(control, app, APP | {f"f{number}": "x" for number in range(2000)})
    await control.stop_daemon()
    await control.start_daemon()
    assert (await control.services.deployments.task(task)).status == "failed"
    (failed,) = await control.services.deployments.list(app)
    assert failed.reason == "The server was restarted meanwhile; deploy again."
    assert control.catalog.get(app.id).active_bundle is None
    assert bundle not in {path.name for path in (control.state / "bundles").iterdir()}
    assert not list((control.state / "uploads").iterdir())


async def deployed(control, name="plain"):
    bundle, task = await upload(control, control.catalog.named(name))
    assert (await over(control, task)).status == "completed"
    return bundle


async def test_a_bundle_is_kept_while_a_worker_runs_it_that_is_not_taken_over_yet(start):
    control = await start("storage.bundle_retention = 1")
    await control.catalog.change(await control.catalog.create("plain", "admin"), {"access_type": "public"})
    first = await deployed(control)
    await control.visit()
    await control.stop_daemon()
    control.spawner.stop()
    await control.start_daemon(adopted=False)
    await deployed(control)
    third = await deployed(control)
    bundles = control.state / "bundles"
    assert {path.name for path in bundles.iterdir()} == {first, third}
    assert {bundle.id for bundle in await control.services.deployments.list(control.catalog.named("plain"))} == {
        first,
        third,
    }
    control.spawner.start()
    await until(control.fleet.adopted.is_set, "adoption")
    assert [worker.bundle_id for worker in control.fleet.all()] == [first]


@pytest.mark.parametrize(
    "stray",
    [
        lambda directory, name: (directory / name).write_text("x"),
        lambda directory, name: (directory / name).symlink_to(directory.parent / "logs"),
        lambda directory, name: (directory / name).symlink_to("nowhere"),
        lambda directory, name: (directory / name / "more").mkdir(parents=True),
    ],
    ids=["file", "link", "dead-link", "directory"],
)
async def test_what_strays_into_the_state_directory_is_cleared_away_at_the_next_start(start, stray):
    control = await start()
    await control.stop_daemon()
    for directory in ("bundles", "uploads"):
        stray(control.state / directory, "stray")
    await control.start_daemon()
    assert not [*(control.state / "bundles").iterdir(), *(control.state / "uploads").iterdir()]
    assert (control.state / "logs").is_dir()  # and what was linked to is none of its business


async def test_what_cannot_be_cleared_away_is_told_and_does_not_stop_the_start(start, monkeypatch, caplog):
    control = await start()
    await control.stop_daemon()
    places = [control.state / directory / "lost+found" for directory in ("bundles", "uploads")]
    for place in places:
        place.mkdir()
    (control.state / "bundles" / "half").mkdir()

    def denied(path, remove=deploy.remove):
        if path in places:  # of another user, as on a file system mounted there
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        remove(path)

    monkeypatch.setattr(deploy, "remove", denied)
    await control.start_daemon()
    monkeypatch.undo()
    assert not (control.state / "bundles" / "half").exists()
    assert [place for place in places if str(place) in caplog.text] == places
