"""Ports for servers of ours: nobody else gets them between the choice and the start, or between two starts."""

import socket
import sys

import pytest

from simulations.engines.processes import free_ports


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a server have a port that is held")
def test_a_free_port_is_held_for_who_asked():
    ports = free_ports(50)
    assert len(set(ports)) == 50
    here = ("127.0.0.1", ports[0])
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(here)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(here)
        with socket.create_server(here), socket.create_connection(here):
            pass
