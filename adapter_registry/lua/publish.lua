-- With blobs.lua.
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
for i = 6, #ARGV, 2 do
  if not is_held(KEYS[5], KEYS[6], ARGV[i]) then return {'unclaimed', ARGV[i]} end
end
local full = over_quota(KEYS[9], KEYS[8], ARGV, 6)
if full then return full end
-- `numbers` outlives deletes: a version number never means two contents.
local number = redis.call('HINCRBY', KEYS[4], ARGV[1], 1)
redis.call('HSET', KEYS[2], number, ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], number)
redis.call('SADD', KEYS[1], ARGV[1])
for i = 6, #ARGV, 2 do hold(KEYS[5], KEYS[6], KEYS[8], ARGV[i], ARGV[i + 1]) end
redis.call(
  'XADD', KEYS[7], 'MAXLEN', '~', ARGV[5], '*', 'by', ARGV[4], 'action', 'version.published',
  'subject', ARGV[1] .. '@' .. number, 'detail', ARGV[2]
)
return {'new', tostring(number), ARGV[3]}
