-- Number a version and make it visible, or find the one with the same digest.
-- KEYS: names, versions, digests, numbers, refs, garbage, audit.
-- ARGV: name, digest, envelope, who, audit entries to keep, blob sha256s...
-- Answers {'known' | 'new', number, envelope} or {'unclaimed', sha256}.
local known = redis.call('HGET', KEYS[3], ARGV[2])
if known then
  return {'known', known, redis.call('HGET', KEYS[2], known)}
end
-- Look before writing anything: a script that stops half-way is not rolled back. A blob is in at most one of refs,
-- garbage and deleting, so one that a sweeper is removing right now is refused here as well.
for i = 6, #ARGV do
  local sha = ARGV[i]
  local protected = redis.call('HEXISTS', KEYS[5], sha) == 1 or redis.call('ZSCORE', KEYS[6], sha)
  if not protected then
    return {'unclaimed', sha}
  end
end
-- `numbers` outlives deletes: a version number never means two contents.
local number = redis.call('HINCRBY', KEYS[4], ARGV[1], 1)
redis.call('HSET', KEYS[2], number, ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], number)
redis.call('SADD', KEYS[1], ARGV[1])
for i = 6, #ARGV do
  redis.call('HINCRBY', KEYS[5], ARGV[i], 1)
  redis.call('ZREM', KEYS[6], ARGV[i])
end
redis.call(
  'XADD', KEYS[7], 'MAXLEN', '~', ARGV[5], '*', 'by', ARGV[4], 'action', 'version.published',
  'subject', ARGV[1] .. '@' .. number, 'detail', ARGV[2]
)
return {'new', tostring(number), ARGV[3]}
