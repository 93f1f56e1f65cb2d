"""An S3-speaking server on this machine's loopback, for the tests that need a remote store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock
from urllib.request import Request, urlopen

import fsspec

HOST = "127.0.0.1"


class Server:
    """It keeps what it holds while it is stopped, and comes back at the same port."""

    port = 0

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
        self._moto = ThreadedMotoServer(HOST, self.port, verbose=False)
        self._moto.start()
        _, self.port = self._moto.get_host_and_port()

    def stop(self) -> None:
        self._moto.stop()


@contextmanager
def s3(
    bucket: str, key: str = "x", secret: str = "x", server: Server | None = None
) -> Iterator[fsspec.AbstractFileSystem]:
    """s3fs's view of a new server with one empty bucket; this process and its children find it in the environment."""
    server = server or Server()
    server.start()
    account = {
        "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{server.port}", "no_proxy": HOST, "NO_PROXY": HOST,
    }  # fmt: skip
    try:
        with mock.patch.dict("os.environ", account):
            fsspec.filesystem("s3").clear_instance_cache()
            files = fsspec.filesystem("s3")
            # What an earlier server of this process held is still there.
            urlopen(Request(f"http://{HOST}:{server.port}/moto-api/reset", method="POST")).close()
            files.mkdir(bucket)
            yield files
            files.clear_instance_cache()
    finally:
        server.stop()
