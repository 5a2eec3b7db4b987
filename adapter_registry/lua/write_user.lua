-- Keep a user's record, or (record '') remove it. KEYS: users, audit.
-- ARGV: name, record, who, action, role, audit entries to keep. Answers 1, or 0 when there is none to remove.
if ARGV[2] == '' then
  if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
else
  if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return 1 end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call(
  'XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', 'by', ARGV[3], 'action', ARGV[4], 'subject', ARGV[1], 'detail', ARGV[5]
)
return 1
