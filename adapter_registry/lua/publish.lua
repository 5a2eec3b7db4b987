-- Number a version and make it visible, or find the one with the same digest.
-- KEYS: names, versions, digests, numbers, refs, garbage, audit, sizes, tenant's settings.
-- ARGV: name, digest, envelope, who, audit entries to keep, then sha256 and bytes of each blob.
-- Answers {'known' | 'new', number, envelope}, {'unclaimed', sha256} or {'full', quota, bytes stored, bytes more}.
local known = redis.call('HGET', KEYS[3], ARGV[2])
if known then
  return {'known', known, redis.call('HGET', KEYS[2], known)}
end
-- Look before writing anything: a script that stops half-way is not rolled back. A blob is in at most one of refs,
-- garbage and deleting, so one that a sweeper is removing right now is refused here as well.
local more = 0
for i = 6, #ARGV, 2 do
  local sha = ARGV[i]
  if redis.call('HEXISTS', KEYS[5], sha) == 0 and not redis.call('ZSCORE', KEYS[6], sha) then
    return {'unclaimed', sha}
  end
  if redis.call('HEXISTS', KEYS[8], sha) == 0 then more = more + ARGV[i + 1] end
end
local settings = redis.call('GET', KEYS[9])
local quota = settings and cjson.decode(settings).quota
local limit = quota and quota.storage_bytes
local stored = tonumber(redis.call('HGET', KEYS[8], 'total') or 0)
if type(limit) == 'number' and stored + more > limit then
  return {'full', string.format('%d', limit), string.format('%d', stored), string.format('%d', more)}
end
-- `numbers` outlives deletes: a version number never means two contents.
local number = redis.call('HINCRBY', KEYS[4], ARGV[1], 1)
redis.call('HSET', KEYS[2], number, ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], number)
redis.call('SADD', KEYS[1], ARGV[1])
for i = 6, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[5], ARGV[i], 1)
  if redis.call('HSETNX', KEYS[8], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HINCRBY', KEYS[8], 'total', ARGV[i + 1])
  end
  redis.call('ZREM', KEYS[6], ARGV[i])
end
redis.call(
  'XADD', KEYS[7], 'MAXLEN', '~', ARGV[5], '*', 'by', ARGV[4], 'action', 'version.published',
  'subject', ARGV[1] .. '@' .. number, 'detail', ARGV[2]
)
return {'new', tostring(number), ARGV[3]}
