-- Compare and set: replace a version's envelope if it still is what was read. KEYS: versions.
-- ARGV: version, envelope as read, new envelope. Answers 1, or 0: read it again.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
