"""Addresses: what is one, and when two collide."""

import pytest

from embedserve.address import addresses_collide, listens_once, split_address, split_addresses


class TestSplit:
    @pytest.mark.parametrize(
        ("address", "parts"),
        [
            ("127.0.0.1:50051", ("127.0.0.1", 50051)),
            ("[::]:0", ("[::]", 0)),
            ("embed.example:65535", ("embed.example", 65535)),
            ("unix:/run/embedserve.sock", ("unix:/run/embedserve.sock", 0)),
        ],
    )
    def test_host_and_port(self, address, parts):
        assert split_address(address) == parts

    @pytest.mark.parametrize(
        ("address", "why"),
        [
            ("", "not host:port"),
            ("localhost", "not host:port"),
            (":50051", "not host:port"),
            ("localhost:", "not host:port"),
            ("localhost:http", "not host:port"),
            ("localhost:65536", "not host:port"),
            ("localhost:٣", "not host:port"),
            ("::1:50051", "brackets"),
            ("unix:run/e.sock", "absolute path"),
            ("local host:1", "space"),
        ],
    )
    def test_what_is_wrong_is_said(self, address, why):
        with pytest.raises(ValueError, match=why):
            split_address(address)

    def test_several_by_commas(self):
        assert split_addresses("[::]:1, unix:/a") == ("[::]:1", "unix:/a")

    @pytest.mark.parametrize("addresses", ["", "a:1,", ",", "a:1,a:1"])
    def test_none_may_be_missing_or_repeated(self, addresses):
        with pytest.raises(ValueError):
            split_addresses(addresses)

    @pytest.mark.parametrize("address", ["unix:/a", "a:1,b:2"])
    def test_http_listens_on_one_port(self, address):
        with pytest.raises(ValueError, match="one port"):
            listens_once(address)


class TestCollide:
    @pytest.mark.parametrize(
        ("one", "other", "collide"),
        [
            ("a:1", "a:1", True),
            ("a:1", "a:2", False),
            ("a:1", "b:1", False),
            ("0.0.0.0:1", "a:1", True),
            ("a:1", "[::]:1", True),
            ("a:0", "a:0", False),
            ("unix:/a", "unix:/a", True),
            ("unix:/a", "unix:/b", False),
            ("unix:/a", "0.0.0.0:0", False),
        ],
    )
    def test_same_port_of_the_same_host(self, one, other, collide):
        assert addresses_collide(one, other) is collide
        assert addresses_collide(other, one) is collide
