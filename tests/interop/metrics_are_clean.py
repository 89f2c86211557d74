"""promtool finds nothing to say about /metrics; the names of the manual are there; no API on TCP."""

import urllib.error
import urllib.request

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, scratch, wait_until
from harness.server import Afterimage
from harness.sites import Certificates

NAMES = """build_info group_state recoverable_timestamp_seconds replication_backlog_bytes log_size_bytes
log_unshipped_bytes log_undestaged_bytes ring_used_bytes ring_size_bytes write_stall_seconds_total
nbd_request_duration_seconds nbd_connections log_sync_duration_seconds shipped_bytes_total
segment_payload_bytes_total checkpoints_total last_checkpoint_timestamp_seconds freeze_window_seconds
pass_remaining_bytes history_gap_seconds_total oldest_point_timestamp_seconds last_verified_timestamp_seconds
certificate_expiry_timestamp_seconds errors_total replication_errors_total verify_mismatched_blocks_total
last_compared_timestamp_seconds""".split()
# Not at all before it has happened would hide the first from increase().
FROM_THE_START = ['errors_total{group="vm1",kind="log"} 0', 'errors_total{group="vm1",kind="backing"} 0',
                  'errors_total{group="vm1",kind="history_gap"} 0',
                  'verify_mismatched_blocks_total{group="vm1",target="{target}"} 0']
GUEST = '[[group.guest]]\nfreeze = ["/bin/true"]\nthaw = ["/bin/true"]'


def scraped(server):
    """What /metrics says."""
    return urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()


with scratch() as folder:
    certificates = Certificates(folder / "ca")
    tls = f"[ship]\ntls = {certificates.client_table(certificates.client('vm1'))}"
    server = Afterimage(folder, group_lines=GUEST, lines=tls)
    server.start()
    with Connection(server.socket).open_export("vm1/vda") as client:
        client.write(0, b"x" * 65536)
        client.flush()
        client.read(0, 4096)
        server.checkpoint("one")
        server.cli("checkpoint", "vm1", "--app")
        server.wait_shipped()
        server.cli("verify", "vm1")
        server.cli("verify", "vm1", "--disks")
        wait_until(lambda: "\nafterimage_last_verified_timestamp_seconds" in scraped(server), "the result of the check")
        text = scraped(server)
    from_the_start = [line.replace("{target}", f"file://{server.repository}") for line in FROM_THE_START]
    base = f"http://127.0.0.1:{server.metrics_port}"
    checked = run("promtool", "check", "metrics", input=text)
    expect_equal((checked.stdout + checked.stderr).strip(), "", "promtool's remarks")
    expect_equal([name for name in NAMES if f"\nafterimage_{name}" not in f"\n{text}"], [], "names that are missing")
    lines = [line.removeprefix("afterimage_") for line in text.splitlines()]
    expect_equal([line for line in from_the_start if line not in lines], [], "counters that are not there yet")
    for kind in ("crash", "application"):
        last = f'last_checkpoint_timestamp_seconds{{group="vm1",kind="{kind}"}} '
        expect(any(line.startswith(last) for line in lines), f"the time of the last {kind} checkpoint")
    files = {line.split('file="')[1].split('"')[0] for line in lines if line.startswith("certificate_expiry")}
    expect_equal(len(files), 2, f"certificates shown, one's own and the CA's: {files}")
    expect_equal(urllib.request.urlopen(f"{base}/healthz", timeout=30).status, 200, "healthz")
    for path in ["/v1/status", "/v1/groups/vm1/points", "/"]:
        try:
            urllib.request.urlopen(base + path, timeout=30)
        except urllib.error.HTTPError as error:
            expect_equal(error.code, 404, f"{path} over TCP")
        else:
            expect(False, f"{path} is answered over TCP")
    mode = (server.folder / "api.sock").stat().st_mode & 0o777
    expect_equal(oct(mode), oct(0o600), "mode of the API's socket")
    server.close()
