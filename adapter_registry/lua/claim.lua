-- Protect blobs from the sweep for the grace period. KEYS: refs, garbage, deleting. ARGV: sha256s.
-- Answers how many are being deleted right now; unless that is 0, nothing was claimed.
local leaving = 0
for _, sha in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[3], sha) then leaving = leaving + 1 end
end
if leaving > 0 then return leaving end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for _, sha in ipairs(ARGV) do
  -- Fresh garbage is what a claim is: if the publish never comes, the sweep finds it by itself.
  if redis.call('HEXISTS', KEYS[1], sha) == 0 then redis.call('ZADD', KEYS[2], now_ms, sha) end
end
return 0
