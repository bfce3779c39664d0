"""Images of other servers: protocols, sizes and deadlines."""

import contextlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from emma_hf.serving import Limits, RequestError
from emma_hf.serving.images import open_images, read_urls

RED = io.BytesIO()
Image.new("RGB", (4, 3), "red").save(RED, "PNG")
RED = RED.getvalue()


class Images(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/to-ftp":
            self.redirect("ftp://127.0.0.1/red.png")
        elif self.path == "/to-file":
            self.redirect("file:///etc/hostname")
        elif self.path == "/to-itself":
            self.redirect("/to-itself")
        elif self.path == "/to-red":
            self.redirect("/red.png")
        elif self.path == "/slow-headers":
            with contextlib.suppress(OSError):
                self.drip(b"HTTP/1.1 200 OK\r\n" + b"x-header: x\r\n" * 100)
        else:
            self.send_response(404 if self.path == "/missing.png" else 200)
            self.end_headers()
            with contextlib.suppress(OSError):
                (self.drip if self.path == "/slow.png" else self.wfile.write)(RED)

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def drip(self, data: bytes) -> None:
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.2)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read(*urls: str, **limits) -> list[bytes]:
    return read_urls(list(urls), Limits(remote_pictures=True, **limits))


def test_an_image_is_fetched_where_it_is_allowed(address):
    (image,) = open_images(read(f"{address}/to-red"), Limits())
    assert image.size == (4, 3)
    with pytest.raises(RequestError, match="This server fetches no pictures: got 'http://127.0.0.1"):
        read_urls([f"{address}/red.png"], Limits())


def test_the_bytes_of_all_images_are_limited_together(address):
    with pytest.raises(RequestError, match="at most 10 bytes: got more from 'http") as caught:
        read(f"{address}/red.png", request_bytes=10)
    assert caught.value.status == 413
    assert read(*[f"{address}/red.png"] * 2, request_bytes=2 * len(RED)) == [RED, RED]
    with pytest.raises(RequestError, match="Picture 2 of 2: A picture may have at most .* bytes: got more"):
        read(*[f"{address}/red.png"] * 2, request_bytes=2 * len(RED) - 1)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing.png", "404"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/to-file", "not allowed"),
        ("/to-itself", "infinite loop"),
    ],
)
def test_what_an_address_cannot_lead_to(address, path, reason):
    with pytest.raises(RequestError, match=f"The picture at 'http.*' cannot be fetched .*{reason}"):
        read(f"{address}{path}")


@pytest.mark.parametrize("url", ["http://[", "http://", "http://a b/", "http://127.0.0.1:99999/", "HTTP://\x00"])
def test_addresses_that_are_none(url):
    with pytest.raises(RequestError, match="The picture at .* cannot be fetched"):
        read(url)


def test_a_port_that_is_too_large_asks_no_other_server(address):
    port = int(address.rsplit(":", 1)[1]) + 65536
    with pytest.raises(RequestError, match=f"cannot be fetched .*a port is 1 to 65535: got {port}"):
        read(f"http://127.0.0.1:{port}/red.png")


@pytest.mark.parametrize("path", ["/slow.png", "/slow-headers"])
def test_the_deadline_is_of_the_whole_fetch(address, path):
    start = time.monotonic()
    # Without it, the first of these would take 15 seconds, whose every byte comes in time.
    with pytest.raises(RequestError, match="must arrive within 0.7 seconds: 'http.*' took longer"):
        read(f"{address}/red.png", f"{address}{path}", fetch_seconds=0.7)
    assert time.monotonic() - start < 3
