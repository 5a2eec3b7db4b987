-- Compare and set: replace a job's record if it still is what was read. KEYS: jobs, uses.
-- ARGV: id, value as read, new value (each write's own), then the files it lets go of (when it ends). Answers 1, or 0: read it again.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored == ARGV[3] then return 1 end -- the answer to an earlier try was lost
if stored ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
for i = 4, #ARGV do
  if redis.call('HINCRBY', KEYS[2], ARGV[i], -1) <= 0 then redis.call('HDEL', KEYS[2], ARGV[i]) end
end
return 1
