"""An S3-speaking server on this machine's loopback, for the tests that need a remote store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec


@contextmanager
def s3(bucket: str, key: str = "x", secret: str = "x") -> Iterator[fsspec.AbstractFileSystem]:
    """s3fs's view of a new server with one empty bucket; this process and its children find it in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {
        "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    try:
        with mock.patch.dict("os.environ", account):
            fsspec.filesystem("s3").clear_instance_cache()
            files = fsspec.filesystem("s3")
            files.mkdir(bucket)
            yield files
            files.clear_instance_cache()
    finally:
        server.stop()
