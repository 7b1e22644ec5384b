"""A TLS proxy that keeps all that passes through it in clear: run as a script, used by test_deployment.py.

recorder.py PORT UPSTREAM_PORT FOLDER     FOLDER holds ca.crt, server.pem, server.key;
                                          <connection>.up and <connection>.down are added
"""

import asyncio
import contextlib
import ssl
import sys
from pathlib import Path


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, copy: Path) -> None:
    """One direction of one connection."""
    with copy.open("ab", buffering=0) as file, contextlib.suppress(OSError, ssl.SSLError):
        while content := await reader.read(1 << 16):
            file.write(content)
            writer.write(content)
            await writer.drain()
    writer.close()


async def main(port: int, upstream: int, folder: Path) -> None:
    inside = ssl.create_default_context(cafile=folder / "ca.crt")
    outside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    outside.load_cert_chain(folder / "server.pem", folder / "server.key")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(numbers)
        try:
            there = await asyncio.open_connection("127.0.0.1", upstream, ssl=inside, server_hostname="localhost")
        except OSError:
            writer.close()
            return
        up, down = (folder / f"{number:06d}.{way}" for way in ("up", "down"))
        await asyncio.gather(pump(reader, there[1], up), pump(there[0], writer, down))

    numbers = iter(range(10**6))
    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=outside)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
