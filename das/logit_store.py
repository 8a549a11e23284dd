"""Logit blocks and watermarks in Redis, as the teacher writes them and students fetch them.

All keys of one partition share a hash tag, hence one slot of a Redis Cluster: a write is one atomic script, a fetch is
one MGET. Blocks and watermarks expire; the writer epoch, one small key per partition and teacher, does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, cast

import redis
from redis.commands.core import Script

from das.errors import ConfigError, Fatal
from das.redis_check import check_client
from das.redis_client import RedisConfig, connect, errors_named

__all__ = ["Fetched", "FetchedPairs", "LogitStore", "PutResult", "RedisConfig"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")

# KEYS: watermark, epoch, the blocks of n messages, then what is stored beside each, if anything.
# ARGV: watermark, ttl in ms, writer epoch (0: none), n, values of KEYS from the third on.
# Everything is checked before the first write, because a script that fails half-way is not rolled back. A message of
# which one value is there with other bytes keeps what it has: values of two scorings must not meet.
_PUT = """
local held = redis.call('GET', KEYS[2])
if held and tonumber(held) > tonumber(ARGV[3]) then return {-1, held} end
local reached = redis.call('GET', KEYS[1])
if reached and not tonumber(reached) then return redis.error_reply('ERR the watermark is not a number') end
local n, last, absent, count, written, identical = tonumber(ARGV[4]), #KEYS, {}, 0, 0, 0
for i = 3, n + 2 do
  local before, same = count, true
  for j = i, last, n do
    local there = redis.pcall('GET', KEYS[j])
    if there == false then
      count = count + 1
      absent[count] = j
    elseif there ~= ARGV[j + 2] then same = false end
  end
  if not same then count = before
  elseif count > before then written = written + 1
  else identical = identical + 1 end
end
for k = 1, count do redis.call('SET', KEYS[absent[k]], ARGV[absent[k] + 2], 'PX', ARGV[2]) end
if not reached or tonumber(reached) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
else redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if held ~= ARGV[3] and ARGV[3] ~= '0' then redis.call('SET', KEYS[2], ARGV[3]) end
return {written, identical, n - written - identical}
"""

# KEYS: epoch. At least the server's clock, so that epochs go on rising after the store lost its data.
_ACQUIRE = """
local now = redis.call('TIME')
local epoch = math.floor(tonumber(now[1]) * 1000 + tonumber(now[2]) / 1000)
local held = redis.call('GET', KEYS[1])
if held and tonumber(held) >= epoch then epoch = tonumber(held) + 1 end
local text = string.format('%.0f', epoch)
redis.call('SET', KEYS[1], text)
return text
"""


class PutResult(NamedTuple):
    """What became of the messages of one `put`: something of it stored now, all of it there byte for byte, or refused
    because other bytes were there."""

    written: int
    identical: int
    refused: int


class Fetched(NamedTuple):
    """One partition as of one moment: every offset below `watermark` was scored; `blocks` in the order asked for."""

    watermark: int
    blocks: list[bytes | None]


class FetchedPairs(NamedTuple):
    """`Fetched`, with the raw embedding block of each offset."""

    watermark: int
    blocks: list[bytes | None]
    embeddings: list[bytes | None]


class LogitStore:
    """The logits of one teacher over one topic. Thread-safe; connects at its first call.

    Every method raises Retryable when the server is away, full or busy, and Fatal when waiting will not help.
    """

    def __init__(self, config: RedisConfig, *, topic: str, teacher: str, ttl_s: float) -> None:
        """`ttl_s`: how long blocks live, the topic's retention. Raises ConfigError on an unusable name or time."""
        for what, name in (("topic", topic), ("teacher", teacher)):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{what} '{name}': use letters, digits, dot, dash and underscore only")
        if not ttl_s >= 0.001:
            raise ConfigError(f"the time to live of logits must be positive, not {ttl_s} s")
        self.address = config.address
        self._config = config
        self.topic = topic
        self.teacher = teacher
        self._ttl_ms = int(ttl_s * 1000)
        self._epochs: dict[int, int] = {}

    @cached_property
    def _client(self) -> redis.Redis:
        return connect(self._config)

    @cached_property
    def _put(self) -> Script:
        return self._client.register_script(_PUT)

    @cached_property
    def _acquire(self) -> Script:
        return self._client.register_script(_ACQUIRE)

    def block_key(self, partition: int, offset: int) -> str:
        """The key of one block."""
        return f"exfm:{{{self.topic}:{partition}}}:logits:{self.teacher}:{offset}"

    def _block_keys(self, partition: int, offsets: Iterable[int]) -> list[str]:
        prefix = self.block_key(partition, 0)[:-1]
        return [f"{prefix}{offset}" for offset in offsets]

    def embedding_key(self, partition: int, offset: int) -> str:
        """The key of one embedding block, in the same slot as its logit block."""
        return f"exfm:{{{self.topic}:{partition}}}:embeddings:{self.teacher}:{offset}"

    def _embedding_keys(self, partition: int, offsets: Iterable[int]) -> list[str]:
        prefix = self.embedding_key(partition, 0)[:-1]
        return [f"{prefix}{offset}" for offset in offsets]

    def watermark_key(self, partition: int) -> str:
        """The key of the watermark."""
        return f"exfm:{{{self.topic}:{partition}}}:watermark:{self.teacher}"

    def epoch_key(self, partition: int) -> str:
        """The key of the writer epoch."""
        return f"exfm:{{{self.topic}:{partition}}}:epoch:{self.teacher}"

    def acquire(self, partition: int) -> int:
        """Become the writer of `partition`: every store that acquired it earlier (or never) is refused from now on."""
        with errors_named(self.address):
            epoch = int(cast(bytes, self._acquire(keys=[self.epoch_key(partition)])))
        self._epochs[partition] = epoch
        return epoch

    def put(
        self,
        partition: int,
        blocks: Mapping[int, bytes],
        watermark: int,
        embeddings: Mapping[int, bytes] | None = None,
    ) -> PutResult:
        """Store encoded blocks by offset and raise the watermark, all in one atomic step.

        `embeddings`: embedding blocks of the same offsets, stored in that step too. An offset of which a key holds
        other bytes keeps what it has: the first write wins. The watermark never goes back. Safe to repeat after a
        Retryable, which may mean stored or not. Raises Fatal when another writer acquired the partition.
        """
        epoch = self._epochs.get(partition, 0)
        keys = [self.watermark_key(partition), self.epoch_key(partition)]
        keys += self._block_keys(partition, blocks)
        values = list(blocks.values())
        if embeddings is not None:
            if embeddings.keys() != blocks.keys():
                raise ValueError(f"embeddings of {sorted(embeddings)} do not belong to logits of {sorted(blocks)}")
            keys += self._embedding_keys(partition, blocks)
            values += [embeddings[offset] for offset in blocks]
        with errors_named(self.address):
            reply = cast(list, self._put(keys=keys, args=[watermark, self._ttl_ms, epoch, len(blocks), *values]))
        if reply[0] == -1:
            raise Fatal(
                f"{self.epoch_key(partition)}: writer epoch {epoch} was fenced by {int(reply[1])}: "
                f"another teacher '{self.teacher}' owns partition {partition} now; run one per partition"
            )
        result = PutResult(*reply)
        if sum(result) != len(blocks):
            raise Fatal(f"redis at {self.address} answered {reply} to a put of {len(blocks)} blocks")
        return result

    def fetch(self, partition: int, offsets: Sequence[int]) -> Fetched:
        """The watermark (0: nothing yet) and the raw blocks of `offsets`, in one round trip."""
        return self.fetch_many({partition: offsets})[partition]

    def fetch_many(self, offsets: Mapping[int, Sequence[int]]) -> dict[int, Fetched]:
        """`fetch` for several partitions, in one round trip; each partition is a consistent view of its own."""
        commands = [
            ("MGET", self.watermark_key(partition), *self._block_keys(partition, wanted))
            for partition, wanted in offsets.items()
        ]
        with errors_named(self.address):
            replies = self._execute(commands)
        return {
            partition: Fetched(_watermark(reply[0]), reply[1:])
            for partition, reply in zip(offsets, replies, strict=True)
        }

    def fetch_pairs(self, offsets: Mapping[int, Sequence[int]]) -> dict[int, FetchedPairs]:
        """`fetch_many` with the embedding blocks, in one round trip."""
        commands = [
            (
                *("MGET", self.watermark_key(partition), *self._block_keys(partition, wanted)),
                *self._embedding_keys(partition, wanted),
            )
            for partition, wanted in offsets.items()
        ]
        with errors_named(self.address):
            replies = self._execute(commands)
        return {
            partition: FetchedPairs(_watermark(reply[0]), reply[1 : len(wanted) + 1], reply[len(wanted) + 1 :])
            for (partition, wanted), reply in zip(offsets.items(), replies, strict=True)
        }

    def _execute(self, commands: list[tuple[str, ...]]) -> list[list[bytes | None]]:
        if len(commands) == 1:  # a pipeline of one would take half as long again
            return [cast(list, self._client.execute_command(*commands[0]))]
        with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return cast(list, pipeline.execute())

    def watermark(self, partition: int) -> int:
        """The next offset to be scored; 0 when nothing was."""
        return self.fetch(partition, ()).watermark

    def check(self) -> list[str]:
        """Look at the settings of the server, or of every primary of a cluster, before relying on it.

        Raises ConfigError where logits would vanish silently; returns warnings for the rest.
        """
        with errors_named(self.address):
            client = self._client
        return check_client(client, self.address)

    def close(self) -> None:
        """Close the connections, if there are any."""
        if "_client" in self.__dict__:
            self._client.close()


def _watermark(raw: bytes | None) -> int:
    """A foreign value counts as nothing reached: readers go without logits, and the writer's put says why."""
    try:
        return int(raw or 0)
    except ValueError:
        return 0
