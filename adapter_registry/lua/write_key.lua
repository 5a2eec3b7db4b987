-- Keep an API key's record, replace one that is there (mode 'replace'), or remove it (mode 'remove').
-- KEYS: API keys, their last uses, audit, users.
-- ARGV: key id, record, mode, who, action, label and role, audit entries to keep, its user or '', its role.
-- Answers 1, or 0 when there is none to replace, or no such user, or one that may less.
local order = {caller = 1, publisher = 2, admin = 3}
if ARGV[3] ~= 'remove' and ARGV[8] ~= '' then
  local user = redis.call('HGET', KEYS[4], ARGV[8])
  if not user or order[cjson.decode(user).role] < order[ARGV[9]] then return 0 end
end
if ARGV[3] == 'replace' and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[3] ~= 'remove' and redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return 1 end
if ARGV[3] == 'remove' then
  if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call(
  'XADD', KEYS[3], 'MAXLEN', '~', ARGV[7], '*', 'by', ARGV[4], 'action', ARGV[5], 'subject', ARGV[1], 'detail', ARGV[6]
)
return 1
