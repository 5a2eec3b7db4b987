"""`RegistryData`: the registry's keys as they are, to read some at one moment and to write them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapter_registry.backup.kinds import KeyType
from adapter_registry.backup.records import Item
from adapter_registry.migrations import SCHEMA
from adapter_registry.redis_connection import RESTORING, RedisConnection
from adapter_registry.scripts import PREFIX, SCHEMA_KEY

DATA_SCRIPTS = ("export", "put_part")
_SCANNED_AT_ONCE = 1000
_STREAM_PAGE = 1000
_WORDS_AT_ONCE = 2000  # of one script: Lua unpacks some thousand at most, and the server does nothing else meanwhile
_WIDTHS = {KeyType.HASH: 2, KeyType.ZSET: 2}  # words of an entry, where it is not one


class RegistryData(RedisConnection):
    """Build it with `from_url`; one instance serves one event loop. Reading changes nothing, not even an older schema."""

    SCRIPTS = DATA_SCRIPTS

    async def _check_schema(self) -> None:
        """Any will do: whoever uses this asks for it, and decides."""
        self._schema_checked = True

    async def schema(self) -> str:
        """Of the data; `RESTORING` in the middle of a restore."""
        return str(await self._command("GET", SCHEMA_KEY) or SCHEMA)

    async def set_schema(self, schema: str) -> None:
        """Say of what schema the data are."""
        await self._command("SET", SCHEMA_KEY, schema)

    async def is_restoring(self) -> bool:
        """Whether a restore is under way, or was broken off."""
        return await self.schema() == RESTORING

    async def keys(self) -> set[str]:
        """Every key of the registry, on all nodes, but for the schema's own."""
        async with self._answering():
            found = {str(key) async for key in self._client.scan_iter(match=f"{PREFIX}*", count=_SCANNED_AT_ONCE)}
        return found - {SCHEMA_KEY}

    async def members(self, key: str) -> Sequence[str]:
        """Of a set."""
        return sorted(await self._command("SMEMBERS", key))

    async def read(self, keys: Iterable[str]) -> dict[str, Item]:
        """What is under those of them that are there, at one moment. All must be of one slot. Streams are cut off behind
        what they hold at that moment, and read afterwards."""
        wanted = sorted(set(keys))
        answer = await self._script("export", wanted, []) if wanted else []
        return {key: await self._item(key, KeyType(type_), int(ends), content) for key, type_, ends, content in answer}

    async def _item(self, key: str, type_: KeyType, ends_ms: int, content: Sequence[str]) -> Item:
        if type_ is KeyType.STREAM:
            entries = await self._stream(key, content[0])
        elif type_ in _WIDTHS:
            entries = sorted(zip(content[::2], content[1::2], strict=True))
        elif type_ is KeyType.SET:
            entries = [(word,) for word in sorted(content)]
        else:
            entries = [(word,) for word in content]
        return Item(key=key, type=type_, expires_at_ms=ends_ms if ends_ms >= 0 else None, entries=tuple(entries))

    async def _stream(self, key: str, last: str) -> list[tuple[str, ...]]:
        entries: list[tuple[str, ...]] = []
        after = "-"
        while found := await self._command("XRANGE", key, after, last, "COUNT", str(_STREAM_PAGE)):
            entries += [(id_, *(word for pair in fields.items() for word in pair)) for id_, fields in found]
            after = f"({found[-1][0]}"
        return entries

    async def write(self, item: Item) -> None:
        """Put a key back, instead of what is there. What is long goes in parts, each of which may be sent twice."""
        width = _WIDTHS.get(item.type, 1)
        before = 0
        for part in _parts(item):
            words: list[str | int] = [word for entry in part for word in _words(item.type, entry)]
            await self._script("put_part", [item.key], [item.type, before, width, *words])
            before += len(part)
        if item.expires_at_ms is not None:
            await self._command("PEXPIREAT", item.key, str(item.expires_at_ms))

    async def add(self, key: str, members: Sequence[str]) -> None:
        """To a set."""
        for i in range(0, len(members), _WORDS_AT_ONCE):
            await self._command("SADD", key, *members[i : i + _WORDS_AT_ONCE])

    async def rank(self, key: str, member: str, score: int) -> None:
        """Put into a sorted set."""
        await self._command("ZADD", key, str(score), member)

    async def remove(self, key: str) -> None:
        """Remove a key."""
        await self._command("UNLINK", key)


def _parts(item: Item) -> Iterable[Sequence[tuple[str, ...]]]:
    part: list[tuple[str, ...]] = []
    words = 0
    for entry in item.entries:
        part.append(entry)
        words += len(entry) + 1
        if words >= _WORDS_AT_ONCE:
            yield part
            part, words = [], 0
    if part:
        yield part


def _words(type_: KeyType, entry: tuple[str, ...]) -> Sequence[str | int]:
    return [entry[0], len(entry) - 1, *entry[1:]] if type_ is KeyType.STREAM else entry
